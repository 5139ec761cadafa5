"""Bounds of text tokenizers from files: how far a text may grow, and how long its encoding may take.

A file may hold rules that replace a character by thousands, again and again, and regular expressions that backtrack for
ever. Growth is computed from the rules; time is measured on short texts that grow until one takes too long.
"""

import base64
import binascii
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Characters that one character may become. Unicode's NFKC makes up to 18 of one.
MAX_GROWTH = 200
NFKC_GROWTH = 18
# Characters of the texts that are tried, and seconds of the processor that each may take.
LENGTHS = (8, 12, 16, 20, 24, 28, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MAX_SECONDS = 1.0
# Characters that are tried, with so many of those in the file's regular expressions.
CHARACTERS, FROM_PATTERNS = "a0 !é\n", 20


def require_bounded_json(path: Path, content: str, encode: Callable[[str], object]) -> None:
    """Checks a `tokenizer.json` and its encoding of short texts.

    Raises:
        ValueError: if a text may grow too far, or takes too long.
    """
    parts = json.loads(content)
    for name in ("normalizer", "decoder"):
        if (growth := _growth(parts.get(name))) > MAX_GROWTH:
            raise _too_far(path, f"its {name}", growth)
    patterns = "".join(_patterns(parts.get("normalizer")) + _patterns(parts.get("pre_tokenizer")))
    own = [character for character in dict.fromkeys(patterns) if character.isalnum()][:FROM_PATTERNS]
    with _silent():
        for character in dict.fromkeys([*CHARACTERS, *own]):
            _try(path, encode, character)


def require_bounded_charsmap(path: Path, name: str, charsmap: bytes) -> None:
    """Checks the replacements of a sentencepiece normalizer.

    Raises:
        ValueError: if a character may become too many.
    """
    if (growth := _longest(charsmap)) > MAX_GROWTH:
        raise _too_far(path, f"its {name}", growth)


def is_panic(error: BaseException) -> bool:
    """Whether an error is that of a Rust library, which no `except Exception` catches."""
    return type(error).__name__ == "PanicException"


def _too_far(path: Path, what: str, growth: float) -> ValueError:
    return ValueError(
        f"text_tokenizer.path: {path}: {what} makes up to {growth:,.0f} characters of one, "
        f"expected at most {MAX_GROWTH}"
    )


def _try(path: Path, encode: Callable[[str], object], character: str) -> None:
    for length in LENGTHS:
        started = time.thread_time()
        problem = None
        try:
            encode(character * length + ("?" if character != "?" else "a"))
        except BaseException as error:
            if not is_panic(error):
                raise
            problem = f"fails ({error})"
        if (seconds := time.thread_time() - started) > MAX_SECONDS:
            problem = f"takes {seconds:.1f} s"
        if problem is not None:
            raise ValueError(f"text_tokenizer.path: {path}: encoding {length} times {character!r} {problem}")


def _growth(part: Any) -> float:
    """Characters that a normalizer or decoder makes of one, at most."""
    if not isinstance(part, Mapping):
        return 1
    kind = part.get("type")
    if kind == "Sequence":
        growth = 1.0
        for step in part.get("normalizers") or part.get("decoders") or ():
            growth *= _growth(step)
        return growth
    if kind == "Replace":
        pattern, length = part.get("pattern"), len(str(part.get("content", "")))
        found = pattern.get("String") if isinstance(pattern, Mapping) else None
        return max(1.0, length / len(found)) if found else 1 + length
    if kind == "Prepend":
        return 1 + len(str(part.get("prepend", "")))
    if kind == "Precompiled":
        try:
            return _longest(base64.b64decode(part.get("precompiled_charsmap") or ""))
        except (binascii.Error, ValueError, TypeError):
            return 1
    return NFKC_GROWTH if kind in ("NFKC", "NFKD") else 1


def _longest(charsmap: bytes) -> int:
    """Characters of the longest replacement of a compiled map: size of its index, index, texts that end with NUL."""
    start = 4 + int.from_bytes(charsmap[:4], "little")
    return max((len(text.decode("utf-8", "replace")) for text in charsmap[start:].split(b"\0")), default=0)


def _patterns(part: Any) -> list[str]:
    """The regular expressions in a part of a `tokenizer.json`."""
    if isinstance(part, Mapping):
        own = [part["Regex"]] if isinstance(part.get("Regex"), str) else []
        return own + [pattern for value in part.values() for pattern in _patterns(value)]
    return [pattern for value in part for pattern in _patterns(value)] if isinstance(part, list) else []


@contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that a Rust library writes to the terminal when it fails."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)

"""Digests of image bytes, kept between runs: they decide what is held out, and reading all images takes long."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from t2i_lm.data.image_files import MAX_FILE_BYTES, open_image
from t2i_lm.runtime.progress import Advance, progress
from t2i_lm.storage.reading import require_lasting, require_regular
from t2i_lm.storage.writing import DiskError, write_atomic

# Increment when digests or the order of samples in a file change.
FORMAT = 1
# Progress is shown for more bytes than this.
LONG_BYTES = 200_000_000

# Digest of a file's image, or of those of all its samples.
Entry = str | list[str | None] | None


def image_digest(content: bytes) -> str | None:
    """Hexadecimal digest of an image's bytes; None if they are no image."""
    try:
        open_image(io.BytesIO(content)).close()
    except Exception as error:  # Pillow's readers raise many types on damaged files
        require_lasting(error, "an image")
        return None
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def file_digest(path: Path) -> str | None:
    """`image_digest` of a file; None if it cannot be read.

    Raises:
        ValueError: if the system cannot read it now.
    """
    try:
        require_regular(path)
        content = path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else b""
    except (OSError, ValueError, MemoryError) as error:
        require_lasting(error, str(path))
        return None
    return image_digest(content)


def digests_of_files(
    files: Sequence[str | Path], store: Path, compute: Callable[[Path, Advance], Entry]
) -> list[Entry]:
    """Digests of each file's content; a file of unchanged size and times is not read again, unless it had none.

    Args:
        files: images, or files of many samples.
        store: file of known digests (`store_path`).
        compute: the digests of a file; calls its second argument with the number of bytes read.

    Raises:
        ValueError: if the folder of `store` cannot be created, or the system cannot read a file now.
    """
    names = [os.path.abspath(file) for file in files]
    states = {name: _state(name) for name in names}
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir: cannot create {DiskError.of(error, store.parent)}") from error
    with FileLock(store.with_suffix(".lock")):  # other ranks wait for the first, and read what it wrote
        kept = _read(store)
        missing = [file for file, state in states.items() if state and _known(kept, file, state) is None]
        if missing:
            total = sum(state[0] for file in missing if (state := states[file]))
            bar = progress("reading images for the held-out split", total, unit="bytes")
            with bar if total > LONG_BYTES else nullcontext(_silent) as advance:
                try:
                    for file in missing:
                        kept[file] = [states[file], compute(Path(file), advance)]
                finally:
                    _write(store, kept)
    return [kept[name][1] if states[name] else None for name in names]


def store_path(cache_dir: str, kind: str, origin: Path) -> Path:
    """File of the digests of `kind` of the data at `origin`."""
    name = hashlib.sha256(json.dumps([kind, os.path.abspath(origin)]).encode()).hexdigest()[:16]
    return Path(cache_dir) / "digests" / f"{name}.json"


def image_digests(files: Sequence[str | Path], store: Path) -> list[str | None]:
    """Digests of image files; None for those that are missing or no image."""

    def compute(path: Path, advance: Advance) -> str | None:
        digest = file_digest(path)
        advance(path.stat().st_size)
        return digest

    return digests_of_files(files, store, compute)  # type: ignore[return-value]


def _known(kept: dict[str, Any], file: str, state: list[int]) -> Entry:
    """The digest that is kept for a file in a state; None if there is none, as after a fault while it was read."""
    then, digest = kept.get(file, (None, None))
    return digest if then == state else None


def _silent(_: int) -> None:
    return None


def _state(file: str) -> list[int] | None:
    try:
        found = os.stat(file)
    except (OSError, ValueError) as error:
        require_lasting(error, file)
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _read(store: Path) -> dict[str, Any]:
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
        return dict(content["files"]) if content["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(store: Path, files: dict[str, Any]) -> None:
    write_atomic(store, json.dumps({"format": FORMAT, "files": files}))

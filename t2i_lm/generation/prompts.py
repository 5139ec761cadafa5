"""Prompts from a command line and a file."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from t2i_lm.config.values import as_text
from t2i_lm.storage.reading import reading, require_regular_files


def read_prompts(arguments: Sequence[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then those of a file, one per line; its empty lines are skipped.

    Raises:
        ValueError: if there are none, the file is not regular or not UTF-8, or a prompt of the command line is empty.
    """
    prompts = [as_text(argument) for argument in arguments]
    if file is not None:
        if not file.exists():
            raise ValueError(f"--prompts {file}: no such file")
        require_regular_files(file)
        with reading("--prompts", file):
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError('no prompt: expected one, for example "a small green star", or --prompts FILE')
    require_words(prompts)
    return prompts


def require_words(prompts: Iterable[str]) -> None:
    """Checks that every prompt has a character that is no space.

    Raises:
        ValueError: if one has none.
    """
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty")

"""Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table without a line break behind it; every value is shown as its text is, in one line.

    A token may be a bar, a line break or the beginning of a tag.
    """
    head, *body = (f"| {' | '.join(_cell(value) for value in row)} |" for row in (header, *rows))
    return "\n".join([head, f"|{'---|' * len(header)}", *body])


def _cell(value: Any) -> str:
    text = str(value).strip()
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")

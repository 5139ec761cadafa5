"""Tables as text: fixed-width for a terminal, and Markdown."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any


def text_table(header: Sequence[Any], rows: Iterable[Sequence[Any]], left: Collection[int] = (0,)) -> str:
    """A fixed-width table without a line break at its end; columns are right-aligned, except those in `left`."""
    lines = [[str(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(f"{text:{'<' if number in left else '>'}{width}}" for number, (text, width) in cells).rstrip()

    return "\n".join(map(line, lines))


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table without a line break at its end, one line per row.

    Bars, line breaks and tags, which tokens may contain, are escaped.
    """
    head, *body = (f"| {' | '.join(_cell(value) for value in row)} |" for row in (header, *rows))
    return "\n".join([head, f"|{'---|' * len(header)}", *body])


def _cell(value: Any) -> str:
    text = str(value).strip()
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")

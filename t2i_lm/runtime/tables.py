"""Tables and numbers as text: fixed-width for a terminal, Markdown, LaTeX, counts with a suffix."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any


def compact(number: float, digits: int = 3) -> str:
    """A count with the field's suffixes: 350k, 1.2M, 100B, 2T."""
    rounded = float(f"{number:.{digits}g}")  # 999,999 is 1M
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= size:
            return f"{number / size:.{digits}g}{suffix}"
    return f"{number:.{digits}g}"


def known(error: float | None, digits: int = 4) -> str:
    """A standard error; empty for an unknown one, as that of a single value is."""
    return "" if error is None or math.isnan(error) else f"{error:.{digits}f}"


def with_error(value: str, error: float | None, digits: int = 4, sign: str = "+-") -> str:
    """A value with its standard error, which is left out where it is unknown."""
    return f"{value} {sign} {known(error, digits)}" if known(error) else value


def upper_first(text: str) -> str:
    """A text with an upper-case first letter."""
    return text[:1].upper() + text[1:]


def listed(words: Sequence[str]) -> str:
    """Words in a sentence: `a`, `a and b`, `a, b and c`."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


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

    Bars, line breaks, tags, images and links, which tokens may contain, are escaped.
    """
    head, *body = (f"| {' | '.join(_cell(value) for value in row)} |" for row in (header, *rows))
    return "\n".join([head, f"|{'---|' * len(header)}", *body])


# Characters that LaTeX reads otherwise.
_LATEX = {character: f"\\{character}" for character in "%&_#${}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": r"\newline "}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}

# Others that pdfLaTeX sets: Latin letters (T1 fonts); dashes, quotes, an ellipsis, the euro.
_LATEX_SETS = {*range(0x20, 0x7F), *range(0xA0, 0x180)}
_LATEX_SETS |= {0x2013, 0x2014, 0x2018, 0x2019, 0x201A, 0x201C, 0x201D, 0x201E, 0x2026, 0x20AC}


def _in_latex(mark: str) -> str:
    return _LATEX.get(mark) or (mark if ord(mark) in _LATEX_SETS else f"[U+{ord(mark):04X}]")


def latex_table(header: Sequence[Any], rows: Iterable[Sequence[Any]], columns: str) -> str:
    """A LaTeX `tabular` in the style of booktabs, without a line break at its end.

    Args:
        header: cells of the first row.
        rows: cells of the others, as plain text, which is escaped; of characters that pdfLaTeX does not set, such as
            those that stand for undecodable bytes, the code is shown.
        columns: the `tabular`'s column specification.
    """

    def line(row: Sequence[Any]) -> str:
        text = " & ".join("".join(map(_in_latex, str(value).strip())) for value in row)
        # After the end of a line above, [ would begin its length, and * be its star.
        return f"{{{text[0]}}}{text[1:]} \\\\" if text.startswith(("[", "*")) else f"{text} \\\\"

    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(header), r"\midrule", *map(line, rows)]
    return "\n".join([*body, r"\bottomrule", r"\end{tabular}"])


# In this order; an image or link in a cell would be fetched by who looks at the table.
_MARKDOWN = (
    ("\\", "\\\\"),
    ("|", "\\|"),
    ("<", "&lt;"),
    ("![", "!\\["),
    ("](", "]\\("),
    ("][", "]\\["),
    ("\n", "<br>"),
)


def _cell(value: Any) -> str:
    text = str(value).strip()
    for plain, written in _MARKDOWN:
        text = text.replace(plain, written)
    return text

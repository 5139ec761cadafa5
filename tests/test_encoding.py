"""Files are UTF-8 in every locale: no text is read or written with the locale's encoding."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(file for folder in ("t2i_lm", "callbacks", "benchmarks") for file in (ROOT / folder).rglob("*.py"))
# Place of the encoding among positional arguments.
TEXT = {"read_text": 0, "write_text": 1}
# Of other classes than Path, or in binary.
OTHER_OPEN = ("Image", "tarfile", "os", "gzip")


def without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that read or write text in the locale's encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        stated = any(keyword.arg == "encoding" for keyword in node.keywords)
        if stated or (name not in TEXT and name != "open") or owner in OTHER_OPEN:
            continue
        if name in TEXT:
            missing = len(node.args) <= TEXT[name]
        else:
            modes = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            unknown = any(not isinstance(one, ast.Constant) for one in node.args[isinstance(node.func, ast.Name) :])
            missing = not unknown and not any("b" in mode for mode in modes)
        if missing:
            yield node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_text_is_read_and_written_as_utf8(file: Path) -> None:
    lines = list(without_encoding(ast.parse(file.read_text(encoding="utf-8"))))
    assert not lines, f"{file} lines {lines}: encoding is missing"

"""Plain text as people store it: encodings, line ends, splits by name, and what cannot be read."""

import gzip
import json
from pathlib import Path

import pytest

from t2i_lm.data.text import read_documents


@pytest.mark.parametrize(
    "content",
    ["one\n\nA\ftwo é".encode(), b"\xef\xbb\xbf" + "one\n\nA\ftwo é".encode(), "one\r\n\r\nA\ftwo é".encode()],
)
@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "X.TXT"])
def test_documents_are_the_same_with_a_byte_order_mark_or_other_line_ends(
    content: bytes, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    for path in (tmp_path, tmp_path / name):
        assert list(read_documents(str(path))) == ["one\n\nA", "two é"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", "text".encode("utf-16")),
        ("x.txt", b"\xe9t\xe9"),
        ("x.txt.gz", b"no gzip"),
        ("x.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9]),
        ("x.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:12] + b"\xff" * 30),
    ],
)
def test_files_that_are_no_text_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.val_path: .*{name} cannot be read as UTF-8 text"):
        list(read_documents(str(tmp_path), "data.val_path"))


def test_text_is_never_mixed_across_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}-0.txt").write_text(split)
    for key, expected in (("data.path", "train"), ("data.replay_path", "train"), ("data.val_path", "validation")):
        assert list(read_documents(str(tmp_path), key)) == [expected]
        assert f"{key}={tmp_path}: left out: " in capsys.readouterr().err
    (tmp_path / "more.txt").write_text("more")
    with pytest.raises(ValueError, match=r"unknown which files are training text .*no split: more\.txt"):
        list(read_documents(str(tmp_path)))


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.md").touch()
    with pytest.raises(ValueError, match=r"no \.txt or \.txt\.gz file in .*it holds x\.md"):
        list(read_documents(str(tmp_path)))


def test_datasets_are_read_by_their_column_text_and_other_types_refused(tmp_path: Path) -> None:
    def write(*rows: dict[str, object]) -> str:
        (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return str(tmp_path / "train.jsonl")

    def documents(folder: Path) -> list[str]:
        from t2i_lm.data.text import _hub_documents

        return list(_hub_documents(str(folder), "data.path"))

    write({"text": "a"}, {"text": None}, {"text": " "}, {"text": "b"})
    assert documents(tmp_path) == ["a", "b"]
    write({"content": "a"})
    with pytest.raises(ValueError, match=r"no column text; it has content"):
        documents(tmp_path)
    write({"text": 1})
    with pytest.raises(ValueError, match=r"row 0: text is of type int, not a string"):
        documents(tmp_path)


def test_a_file_that_is_no_plain_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "The cat sat."}')
    with pytest.raises(ValueError, match=r"data\.path=.*x\.jsonl: expected plain text, a \.txt or \.txt\.gz file"):
        list(read_documents(str(tmp_path / "x.jsonl")))

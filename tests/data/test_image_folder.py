"""Image folders as people write them: kinds of metadata, names of keys, splits, and what cannot be read."""

import csv
import io
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from t2i_lm.config.sections import DataConfig
from t2i_lm.data.image_folder import ImageFolder
from t2i_lm.data.metadata import image_path, read_rows
from t2i_lm.data.pairs import RejectedPairError
from t2i_lm.data.sources import SPLITS, open_source

Rows = list[dict[str, Any]]


def write_images(folder: Path, names: list[str]) -> list[str]:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = zlib.crc32(name.encode())
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
    return names


def lines(rows: Rows, end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def table_csv(rows: Rows) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def table_parquet(rows: Rows) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


FORMS: dict[str, tuple[str, Callable[[Rows], bytes]]] = {
    "lines": ("jsonl", lines),
    "crlf": ("jsonl", lambda rows: lines(rows, "\r\n")),
    "blank lines": ("jsonl", lambda rows: b"\n" + lines(rows, "\n \n\n")),
    "byte order mark": ("jsonl", lambda rows: b"\xef\xbb\xbf" + lines(rows)),
    "no last line feed": ("jsonl", lambda rows: lines(rows)[:-1]),
    "joined with marks": ("jsonl", lambda rows: b"\xef\xbb\xbf" + lines(rows[:1]) + b"\xef\xbb\xbf" + lines(rows[1:])),
    "array": ("jsonl", lambda rows: json.dumps(rows, indent=1).encode()),
    "json": ("json", lambda rows: json.dumps(rows).encode()),
    "csv": ("csv", table_csv),
    "csv with mark": ("csv", lambda rows: b"\xef\xbb\xbf" + table_csv(rows)),
    "parquet": ("parquet", table_parquet),
}
# Separators that `str.splitlines` would split at, quotes, commas, and text that looks like a number.
text = st.text(st.sampled_from("ab \u2028\u2029\x85\x1c\x0b,;\"'\\{[7é")).map(lambda value: f"x{value}x")


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None)
@given(captions=st.lists(text, min_size=1, max_size=4))
def test_every_form_of_metadata_gives_the_same_rows(
    form: str, captions: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    suffix, write = FORMS[form]
    rows = [{"file_name": f"{number}.png", "text": caption} for number, caption in enumerate(captions)]
    path = tmp_path_factory.mktemp("table") / f"metadata.{suffix}"
    path.write_bytes(write(rows))
    assert [row.fields for row in read_rows(path)] == rows


def opened(folder: Path, split: str = "train", **options: Any) -> ImageFolder:
    cache = folder.parent / f"{folder.name}-cache"
    source = open_source(
        DataConfig(source="image_folder", path=str(folder), cache_dir=str(cache), **options), split, 16
    )
    assert isinstance(source, ImageFolder)
    return source


def captions(source: ImageFolder) -> dict[str, list[str]]:
    return {source[index].id: source[index].captions for index in range(len(source))}


@pytest.mark.parametrize("image", ["file_name", "filename", "image", "image_path", "path", "File_Name"])
@pytest.mark.parametrize(("caption", "value"), [("text", "a"), ("caption", ["a"]), ("captions", ["a"]), ("TEXT", "a")])
def test_known_names_of_fields_are_read(image: str, caption: str, value: Any, tmp_path: Path) -> None:
    names = write_images(tmp_path / "x", ["0.png", "1.png"])
    (tmp_path / "x" / "metadata.jsonl").write_bytes(lines([{image: name, caption: value} for name in names]))
    assert captions(opened(tmp_path / "x")) | captions(opened(tmp_path / "x", "val")) == {n: ["a"] for n in names}


def test_rows_of_one_file_are_one_image_with_several_captions(tmp_path: Path) -> None:
    names = write_images(tmp_path / "x", ["0.png", "1.png", "2.png"])
    rows = [{"file_name": name, "caption": f"{name} {number}"} for number in range(3) for name in names]
    (tmp_path / "x" / "metadata.jsonl").write_bytes(lines([*rows, {"file_name": "./0.png", "caption": "again"}]))
    train, val = captions(opened(tmp_path / "x")), captions(opened(tmp_path / "x", "val"))
    assert (len(train), len(val)) == (2, 1)
    for name, texts in (train | val).items():
        assert texts == [f"{name} {number}" for number in range(3)] + ["again"] * (name == "0.png")


@pytest.mark.parametrize("name", ["sub/0.png", "sub\\0.png", "./sub/0.png", "{absolute}"])
def test_names_of_files_are_relative_to_the_metadata_with_either_slash_or_absolute(name: str, tmp_path: Path) -> None:
    write_images(tmp_path, ["sub/0.png"])
    name = name.format(absolute=tmp_path / "sub" / "0.png")
    assert Path(image_path(str(tmp_path), name, "x")).resolve() == (tmp_path / "sub" / "0.png").resolve()


def test_a_backslash_in_the_name_of_a_file_is_kept(tmp_path: Path) -> None:
    write_images(tmp_path, ["a\\0.png"])
    assert Path(image_path(str(tmp_path), "a\\0.png", "x")).is_file()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (None, "no image"),
        ("", "no image"),
        (7, "image name is of type int"),
        ("https://x.org/a.jpg", "image is a URL"),
        ("x" * 5000, "image is text that is no file name"),
        ("a\0b", "image is text that is no file name"),
        ("absent.png", "missing file"),
        ("x" * 300, r"unreadable file \(File name too long\)"),
        (".", r"unreadable file \(Is a directory\)"),
    ],
)
def test_a_row_without_a_readable_image_is_a_reject_that_names_the_line(name: Any, reason: str, tmp_path: Path) -> None:
    names = write_images(tmp_path / "x", ["0.png", "1.png"])
    rows = [{"file_name": value, "caption": "a"} for value in (*names, name)]
    (tmp_path / "x" / "metadata.jsonl").write_bytes(lines(rows))
    source = opened(tmp_path / "x")
    assert len(source) == 2
    with pytest.raises(RejectedPairError, match=rf"metadata\.jsonl line 3.*{reason}"):
        source[1]


def test_a_row_without_a_caption_is_a_reject_that_lists_its_keys(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ["0.png", "1.png"])
    write_images(tmp_path / "val", ["2.png"])
    rows = [{"file_name": "0.png", "caption": "a"}, {"file_name": "1.png", "prompt": "b"}]
    (tmp_path / "train" / "metadata.jsonl").write_bytes(lines(rows))
    (tmp_path / "val" / "metadata.jsonl").write_bytes(lines([{"file_name": "2.png", "caption": "c"}]))
    with pytest.raises(RejectedPairError, match=r"line 2 \(it has file_name, prompt\): no caption"):
        opened(tmp_path)[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.jsonl",
            b'{"file_name": "0.png", "prompt": "a"}',
            r"no caption .* in any row; the first has .*prompt",
        ),
        ("metadata.jsonl", b'{"file": "0.png"', r"line 1: no JSON object"),
        ("metadata.jsonl", b"\n\n[1]\n7", r"no JSON array"),
        ("metadata.jsonl", b"\n\n7", r"line 3: expected a JSON object, not 7"),
        ("metadata.jsonl", b"[1]", r"item 0: expected a JSON object, not 1"),
        ("metadata.jsonl", b"[" * 100_000, r"nested too deeply"),
        ("metadata.jsonl", b'{"a": ' * 100_000, r"line 1: no JSON object: nested too deeply"),
        ("metadata.jsonl", b'{"file_name": ' + b"1" * 5000 + b"}", r"line 1: no JSON object: .*4300 digits"),
        ("metadata.jsonl", b'{"a": 1, "text": "b"}', r"line 1: no file_name or filename .*it has a, text"),
        ("metadata.jsonl", b"\n\n", r"no row in it"),
        ("metadata.jsonl", b"", r"no row in it"),
        ("metadata.jsonl", b'{}\n{"a": "\xff"}', r"line 2: not UTF-8"),
        ("metadata.jsonl", '{"file_name": "a"}'.encode("utf-16"), r"line 1: not UTF-8"),
        ("metadata.csv", b"file_name;text\n0.png;a\n", r"no caption .*the first has file_name;text"),
        ("metadata.csv", b"file_name,text\n0.png,a,b\n", r"line 2: 3 cells, but 2 columns: file_name, text"),
        ("metadata.csv", b'file_name,text\n0.png,"a\n1.png,b\n', r"line 2: no CSV: unexpected end of data"),
        ("metadata.csv", b"text,text\n0.png,a\n", r"line 1: a column name occurs twice"),
        ("metadata.csv", b"file_name,text\n", r"no row in it"),
        ("metadata.parquet", b"PAR1", r"cannot be read as Parquet"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused_in_one_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


ODD_LINES = {
    "nested too deeply": b'{"file_name": ' + b"[" * 100_000,
    "4300 digits": b'{"file_name": "0.png", "caption": "a", "id": ' + b"1" * 5000 + b"}",
    "expected a JSON object": b"[1, 2]",
    "no JSON object": b'{"file_name": "0.png", "captio',
    "no image name": b'{"caption": "a", "id": 3}',
    "ambiguous image name": b'{"File_name": "0.png", "FILE_NAME": "0.png", "caption": "a"}',
    "caption list holds an object": b'{"file_name": "2.png", "caption": [{"text": "a"}]}',
    "caption is NaN": b'{"file_name": "2.png", "caption": NaN}',
    "caption is a number": b'{"file_name": "2.png", "caption": 7}',
    "caption is an object": b'{"file_name": "2.png", "caption": {"a red cat": 1}}',
}


@pytest.mark.parametrize("splits", ["", "train/"])
def test_an_odd_row_is_a_reject_with_a_reason_and_its_line(splits: str, tmp_path: Path) -> None:
    names = write_images(tmp_path, [f"{splits}0.png", f"{splits}1.png", "val/3.png" if splits else "3.png"])
    write_images(tmp_path, ["2.png", f"{splits}2.png"])
    usual = lines([{"file_name": name, "caption": "a"} for name in names]).splitlines()
    for reason, odd in ODD_LINES.items():
        odd = odd.replace(b'"2.png"', f'"{splits}2.png"'.encode())
        (tmp_path / "metadata.jsonl").write_bytes(b"\n".join([usual[0], odd, *usual[1:]]))
        found = read_all(opened(tmp_path))
        assert found.count(["a"]) == len(found) - 1
        (reject,) = (str(error) for error in found if isinstance(error, RejectedPairError))
        assert re.search(rf"metadata\.jsonl line 2.*{reason}", reject), reject


def read_all(source: ImageFolder) -> list[list[str] | RejectedPairError]:
    """The captions of each image, or why it is rejected."""
    found: list[list[str] | RejectedPairError] = []
    for number in range(len(source)):
        try:
            found.append(source[number].captions)
        except RejectedPairError as error:
            found.append(error)
    return found


def test_a_row_of_a_csv_with_more_cells_is_a_reject(tmp_path: Path) -> None:
    names = write_images(tmp_path, ["0.png", "1.png", "2.png"])
    content = table_csv([{"file_name": name, "caption": "a"} for name in names]) + b"3.png,a cat, that sleeps\r\n"
    (tmp_path / "metadata.csv").write_bytes(content)
    (reject,) = (str(error) for error in read_all(opened(tmp_path)) if isinstance(error, RejectedPairError))
    assert re.search(r"metadata\.csv line 5 \(3 cells, but 2 columns.*unreadable row", reject)


def test_folders_of_splits_are_read_by_name_and_test_is_left_out(tmp_path: Path) -> None:
    for number, split in enumerate(("training", "valid", "test")):
        write_images(tmp_path / split, [f"{number}.png"])
        row = {"file_name": f"{number}.png", "caption": split}
        (tmp_path / split / "metadata.csv").write_bytes(table_csv([row]))
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert (captions(train), captions(val)) == ({"0.png": ["training"]}, {"1.png": ["valid"]})
    assert any("left out: test data (test/2.png)" in note for note in train.notes)


def test_a_metadata_file_that_is_named_itself_is_whole(tmp_path: Path) -> None:
    """As Karpathy's lists of COCO, whose training images lie in both folders."""
    splits = ["train", "train", "val", "val", "train"]
    names = write_images(tmp_path, [f"{split}2014/{n}.png" for n, split in enumerate(splits)])
    rows = [{"file_name": name, "caption": name} for name in names]
    for file, several in (("train.jsonl", rows[:4]), ("held.jsonl", rows[4:]), ("val.jsonl", rows[2:4])):
        (tmp_path / file).write_bytes(lines(several))
    train, val = (opened(tmp_path / "train.jsonl", split, val_path=str(tmp_path / "held.jsonl")) for split in SPLITS)
    assert (sorted(captions(train)), sorted(captions(val))) == (sorted(names[:4]), names[4:])
    alone = [captions(opened(tmp_path / "val.jsonl", split)) for split in SPLITS]
    assert sorted(name for found in alone for name in found) == sorted(names[2:4])


def test_a_name_or_caption_field_that_is_odd_is_a_reject_at_most(tmp_path: Path) -> None:
    names = write_images(tmp_path, [f"{n}.png" for n in range(4)])
    (tmp_path / "imag\udce9.png").write_bytes((tmp_path / "0.png").read_bytes())
    rows: Rows = [{"file_name": names[0], "Caption": "a", "CAPTION": "b"}]
    rows += [{"file_name": name, "caption": "a cat"} for name in (*names[1:], "imag\udce9.png")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [opened(tmp_path, split) for split in SPLITS]
    (reject,) = (one for source in sources for one in read_all(source) if isinstance(one, RejectedPairError))
    assert "metadata.jsonl line 1" in str(reject)
    ids = sorted(image.id for source in sources for image in source.images if image.name != names[0])
    assert ids == ["1.png", "2.png", "3.png", "imag\\udce9.png"]


def test_columns_of_parquet_that_are_not_read_may_hold_anything(tmp_path: Path) -> None:
    names = write_images(tmp_path, [f"{n}.png" for n in range(4)])
    columns = {"file_name": names, "caption": ["a cat"] * 4, "day": pyarrow.array([2**31 - 1] * 4, pyarrow.date32())}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "metadata.parquet")
    assert len(captions(opened(tmp_path))) == 3


@pytest.mark.parametrize("how", ["folders of images", "column", "Column"])
def test_one_metadata_file_may_name_the_splits(how: str, tmp_path: Path) -> None:
    by_column = how.lower() == "column"
    splits = ["train", "train", "restval" if by_column else "train", "val", "test"]
    names = [f"{split}2014/{n}.png" if not by_column else f"{n}.png" for n, split in enumerate(splits)]
    write_images(tmp_path, names)
    rows = [{"file_name": name, "caption": split} for name, split in zip(names, splits, strict=True)]
    if by_column:
        rows = [row | {"Split" if how == "Column" else "split": row["caption"]} for row in rows]
    (tmp_path / "metadata.jsonl").write_bytes(lines(rows))
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert [train[index].captions for index in range(3)] == [[split] for split in splits[:3]]
    assert [val[index].captions for index in range(len(val))] == [["val"]]
    odd = {"file_name": "other/0.png", "caption": "a", "Split" if how == "Column" else "split": "?"}
    (tmp_path / "metadata.jsonl").write_bytes(lines([*rows, odd]))
    with pytest.raises(ValueError, match=r"some names say the split and others do not|line 6: split='\?'"):
        opened(tmp_path)


def test_folders_of_metadata_without_splits_are_read_together(tmp_path: Path) -> None:
    for folder in ("cats", "dogs"):
        names = write_images(tmp_path / folder, [f"{n}-{folder}.png" for n in range(3)])
        (tmp_path / folder / "metadata.jsonl").write_bytes(lines([{"file_name": n, "caption": folder} for n in names]))
    found = captions(opened(tmp_path)) | captions(opened(tmp_path, "val"))
    assert found == {f"{folder}/{n}-{folder}.png": [folder] for folder in ("cats", "dogs") for n in range(3)}


def test_images_that_no_row_lists_are_counted_and_two_metadata_files_are_refused(tmp_path: Path) -> None:
    names = write_images(tmp_path, [f"{n}.png" for n in range(4)])
    (tmp_path / "metadata.jsonl").write_bytes(lines([{"file_name": name, "caption": "a"} for name in names[:3]]))
    assert "1 image files are listed by no metadata, so left out (first: " in opened(tmp_path).notes[-1]
    assert ".txt" not in opened(tmp_path).notes[-1]
    (tmp_path / "3.txt").write_text("a caption")
    assert "1 of them have a file of their name (first: 3.txt), which is not read: list" in opened(tmp_path).notes[-1]
    (tmp_path / "metadata.csv").write_bytes(table_csv([{"file_name": "0.png", "caption": "a"}]))
    with pytest.raises(ValueError, match=r"metadata\.csv and metadata\.jsonl are both there"):
        opened(tmp_path)


def test_absolute_names_are_those_of_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_images(tmp_path / "x", [f"{n}.png" for n in range(3)])
    rows = [{"file_name": str(tmp_path / "x" / name), "caption": "absolute"} for name in names]
    rows += [{"file_name": name, "caption": "relative"} for name in names]
    (tmp_path / "x" / "metadata.jsonl").write_bytes(lines(rows))
    monkeypatch.chdir(tmp_path)
    train, val = opened(Path("x")), opened(Path("x"), "val")
    assert not any("listed by no metadata" in note for note in train.notes)
    assert list((captions(train) | captions(val)).values()) == [["absolute", "relative"]] * 3
    write_images(tmp_path / "x", ["more.png"])
    assert (
        opened(Path("x")).notes[-1].endswith("1 image files are listed by no metadata, so left out (first: x/more.png)")
    )


def test_a_folder_without_metadata_lists_what_it_holds(tmp_path: Path) -> None:
    write_images(tmp_path, ["0.png"])
    (tmp_path / "captions.txt").write_text("a")
    with pytest.raises(ValueError, match=r"no metadata\.jsonl.*it holds 0\.png, captions\.txt"):
        opened(tmp_path)
    (tmp_path / "0.txt").write_text("a cat")
    with pytest.raises(ValueError, match=r"1 of them have a file of their name \(first: 0\.txt\), which is not read"):
        opened(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 7, 19, 20, 41])
def test_small_data_has_a_validation_image_or_one_clear_line(count: int, tmp_path: Path) -> None:
    names = write_images(tmp_path, [f"{n}.png" for n in range(count)])
    (tmp_path / "metadata.jsonl").write_bytes(lines([{"file_name": name, "caption": "a cat"} for name in names]))
    if count == 1:
        with pytest.raises(ValueError, match=r"1 distinct readable image in 1 samples; two or more are required"):
            opened(tmp_path)
        return
    assert (len(opened(tmp_path)), len(opened(tmp_path, "val"))) == (count - max(1, count // 20), max(1, count // 20))


def test_an_unreadable_image_is_never_the_validation_image(tmp_path: Path) -> None:
    names = write_images(tmp_path, [f"{n}.png" for n in range(4)])
    (tmp_path / "metadata.jsonl").write_bytes(lines([{"file_name": name, "caption": "a cat"} for name in names]))
    for bad in names:
        content = (tmp_path / bad).read_bytes()
        (tmp_path / bad).write_bytes(b"no")
        assert opened(tmp_path, "val")[0].id != bad
        (tmp_path / bad).write_bytes(content)


def test_a_metadata_file_may_be_named_itself_and_fields_beside_the_caption_are_told(tmp_path: Path) -> None:
    names = write_images(tmp_path, ["0.png", "1.png"])
    rows = [{"file_name": name, "text": "STOP", "caption": "a sign"} for name in names]
    (tmp_path / "signs.csv").write_bytes(table_csv(rows))
    for split in ("train", "val"):
        source = opened(tmp_path / "signs.csv", split)
        assert [source[index].captions for index in range(len(source))] == [["a sign"]]
        assert "captions are caption; not read: text" in source.notes[0]

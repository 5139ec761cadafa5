"""Tables as people write them: columns, types and paths of images, captions of other types, column `split`."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from t2i_lm.config.sections import DataConfig
from t2i_lm.data.pairs import RejectedPairError
from t2i_lm.data.shards.row_groups import find_splits
from t2i_lm.data.sources import open_source
from t2i_lm.data.tables import Stream, Table


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def opened(path: Path, split: str = "train", source: str = "parquet", **options: Any) -> Table:
    data = DataConfig(source=source, path=str(path), **{"cache_dir": str(path.parent / "cache"), **options})
    found = open_source(data, split, 16)
    assert isinstance(found, Table)
    return found


def captions(path: Path) -> list[str]:
    both = [opened(path, split) for split in ("train", "val")]
    return sorted(caption for part in both for index in range(len(part)) for caption in part[index].captions)


CELLS = {
    "string": lambda name, content: name,
    "struct of a path": lambda name, content: {"bytes": None, "path": name},
    "struct of a path alone": lambda name, content: {"path": name},
    "bytes": lambda name, content: content,
    "struct of bytes": lambda name, content: {"bytes": content},
    "struct of both": lambda name, content: {"bytes": content, "path": "elsewhere.png"},
}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize(
    ("image", "caption"), [("image", "caption"), ("image_path", "TEXT"), ("file_name", "text"), ("JPG", "captions")]
)
def test_images_are_bytes_or_paths_relative_to_the_table(kind: str, image: str, caption: str, tmp_path: Path) -> None:
    for part in ("a", "b"):  # paths start at each file's own folder
        (tmp_path / "set" / part / "images").mkdir(parents=True)
        names = [f"images/{number}.png" for number in range(3)]
        contents = [png(10 * ord(part) + number) for number in range(3)]
        for name, content in zip(names, contents, strict=True):
            (tmp_path / "set" / part / name).write_bytes(content)
        cells = [CELLS[kind](name, content) for name, content in zip(names, contents, strict=True)]
        texts = [f"{part}{number}" for number in range(3)]
        write(tmp_path / "set" / part / "x.parquet", {image: cells, caption: texts})
    assert captions(tmp_path / "set") == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_an_absent_file_is_named_with_its_row(tmp_path: Path) -> None:
    table = write(tmp_path / "x.parquet", {"image": ["absent.png", "0.png", "1.png"], "text": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"0 distinct readable images in 3 samples \(first reject: x\.parquet row 0 "):
        opened(table)
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    with pytest.raises(RejectedPairError, match=r"x\.parquet row 0 \(.*absent\.png\): missing file"):
        opened(table)[0]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([{"en": "a"}] * 3, r"column caption \(keys en\): caption is an object"),
        ([1, 2, 3], "caption is a number"),
        ([float("nan")] * 3, "caption is NaN"),
        ([None, None, "a"], "caption is null"),
        ([[["a"]]] * 3, "caption list holds a list"),
        ([["a", None]] * 3, "caption list holds null"),
        (["['a', 'b']"] * 3, "written as text"),
        ([[]] * 3, "no caption"),
    ],
)
def test_captions_of_other_types_are_rejects_that_name_the_row(values: list[Any], reason: str, tmp_path: Path) -> None:
    table = write(tmp_path / "x.parquet", {"image": [png(0)] * 3, "caption": values})
    other = write(tmp_path / "y.parquet", {"image": [png(1)] * 3, "caption": ["a"] * 3})
    with pytest.raises(RejectedPairError, match=rf"x\.parquet row 0.*{reason}"):
        opened(table, val_path=str(other))[0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pixels": [b"x"], "text": ["a"]}, r"no column image .* with bytes or paths; it has pixels \(binary\), text"),
        ({"image": [1], "text": ["a"]}, r"no column image .*; it has image \(int64\), text \(string\)"),
        ({"image": [[b"x"]], "text": ["a"]}, r"no column image .*; it has image \(List\), text"),
        ({"image": [b"x"], "prompt": ["a"]}, r"no column captions or .*; it has image \(binary\), prompt"),
        ({"URL": ["http://x.org"], "TEXT": ["a"]}, r"no column image .*; it has URL \(string\), TEXT \(string\)"),
        ({"image": [b"x"], "Text": ["a"], "TEXT": ["a"]}, r"'Text' and 'TEXT' are the same name in two cases"),
    ],
)
def test_tables_without_the_columns_list_what_they_have(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    for source in ("parquet", "hub"):
        with pytest.raises(ValueError, match=rf"data\.path=.*{message}"):
            opened(write(tmp_path / "set" / "x.parquet", columns).parent, source=source)


def read_captions(table: Any) -> list[list[str]]:
    return [table[index].captions for index in range(len(table))]


def test_a_column_split_is_followed_and_half_a_one_refused(tmp_path: Path) -> None:
    splits = ["train", "val", "test", "train"]
    columns = {"image": [png(n) for n in range(4)], "text": list("abcd"), "split": splits}
    table = write(tmp_path / "x.parquet", columns)
    train, val = opened(table), opened(table, "val")
    assert [train[index].captions for index in range(2)] == [["a"], ["d"]]
    assert [val[index].captions for index in range(len(val))] == [["b"]]
    assert "left out: test data (row 2)" in " ".join(train.notes)
    names = datasets.ClassLabel(names=["val", "test", "train"])
    labeled = datasets.Dataset.from_dict(columns | {"split": [2, 0, 1, 2]}).cast_column("split", names)
    labeled.to_parquet(str(tmp_path / "labels.parquet"))
    assert read_captions(opened(tmp_path / "labels.parquet")) == [["a"], ["d"]]
    assert read_captions(opened(tmp_path / "labels.parquet", "val")) == [["b"]]
    other = write(tmp_path / "other.parquet", columns | {"text": list("efgh")})
    assert read_captions(opened(table, val_path=str(other))) == [["a"], ["d"]]
    assert read_captions(opened(table, "val", val_path=str(other))) == [["f"]]
    table = write(tmp_path / "y.parquet", columns | {"split": ["train", "val", "more", "train"]})
    with pytest.raises(ValueError, match=r"row 2: split='more'"):
        opened(table)


def test_files_named_after_splits_are_kept_apart_as_by_datasets(tmp_path: Path) -> None:
    data = tmp_path / "repo" / "data"
    numbers = iter(range(100))
    for split, count in (("train", 4), ("validation", 2), ("test", 3)):
        rows = [next(numbers) for _ in range(count)]
        texts = [f"{split} {number}" for number in rows]
        write(data / f"{split}-00000-of-00001.parquet", {"image": [png(n) for n in rows], "text": texts})
    for source, path in (("parquet", data), ("parquet", tmp_path / "repo"), ("hub", tmp_path / "repo")):
        train, val = opened(path, source=source), opened(path, "val", source=source)
        assert {train[index].captions[0].split()[0] for index in range(len(train))} == {"train"}
        assert {val[index].captions[0].split()[0] for index in range(len(val))} == {"validation"}
        assert (len(train), len(val)) == (4, 2)
        assert "left out" in train.notes[0]
        assert "test" in train.notes[0]
    write(data / "more.parquet", {"image": [png(99)], "text": ["a"]})
    with pytest.raises(ValueError, match=r"some names say the split and others do not.*no split: more\.parquet"):
        opened(data)


def test_features_of_datasets_that_are_damaged_are_refused_with_the_file(tmp_path: Path) -> None:
    table = pyarrow.table(PAIR).replace_schema_metadata({"huggingface": '{"info": {"features": "image"}}'})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"data\.path=.*: x\.parquet cannot be read as Parquet"):
        opened(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"version https://git-lfs.github.com/spec/v1\n"])
def test_files_that_are_no_parquet_are_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", PAIR)
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.path=.*: x\.parquet cannot be read as Parquet") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


PAIR = {"image": [png(0), png(1)], "text": ["a", "b"]}
OTHERS = {
    "damaged pages": (PAIR, True, r"sub/b\.parquet cannot be read as Parquet"),
    "captions of another type": (PAIR | {"text": [["c"]] * 2}, False, r"sub/b\.parquet cannot be read as Parquet"),
    "no captions": ({"image": [png(2)], "more": [1]}, False, r"sub/b\.parquet: no column captions .* more \(int64\)"),
    "captions of another name": (
        {"image": [png(2)], "captions": ["c"], "text": ["c"]},
        False,
        r"sub/b\.parquet: columns image, captions would be read, but image, text of .*a\.parquet",
    ),
    "a column split": (PAIR | {"split": ["val"] * 2}, False, r"sub/b\.parquet: columns image, text, split would be"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_a_folder_that_cannot_be_read_with_the_others_is_named(kind: str, tmp_path: Path) -> None:
    columns, damages, message = OTHERS[kind]
    write(tmp_path / "a.parquet", PAIR)
    other = write(tmp_path / "sub" / "b.parquet", columns)
    if damages:
        content = bytearray(other.read_bytes())
        content[4:60] = b"\xff" * 56
        other.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.path=.*: {message}"):
        opened(tmp_path)


def test_files_without_rows_and_with_more_columns_are_no_obstacle(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": [], "text": []})  # of unknown types
    columns = pyarrow.table(PAIR)
    with pyarrow.parquet.ParquetWriter(tmp_path / "b.parquet", columns.schema) as writer:
        writer.write_table(columns[:0])  # a row group without rows
        writer.write_table(columns)
    write(tmp_path / "c.parquet", {"more": [1, 2], "image": [png(2), png(3)], "text": ["c", "d"], "alt": ["x"] * 2})
    assert captions(tmp_path) == ["a", "b", "c", "d"]
    found = opened(tmp_path)
    names = [found.origin.of(row)[0] for row in range(4)]
    assert names == ["b.parquet row 0", "b.parquet row 1", "c.parquet row 0", "c.parquet row 1"]
    with pytest.raises(ValueError, match=r"data\.path=.*a\.parquet: no rows in a\.parquet"):
        opened(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["run[1]", "run?", "run*", "[!x]"])
def test_a_folder_whose_name_is_a_pattern_is_read_itself_or_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path / name / "train[0].parquet", PAIR)
    write(tmp_path / "run1" / "train0.parquet", PAIR | {"text": ["other"] * 2})
    assert captions(tmp_path / name) == captions(tmp_path / name / "train[0].parquet") == ["a", "b"]
    message = r"data\.path=.* would match other folders; rename it, or use data\.source=parquet"
    for source in ("hub", "hub_stream"):
        data = DataConfig(source=source, path=str(tmp_path / name), train_size=None, val_size=None)
        with pytest.raises(ValueError, match=message):
            open_source(data, "train", 16)
    with pytest.raises(ValueError, match=message):
        find_splits(str(tmp_path / name), f"data.path={tmp_path / name}")


@pytest.mark.parametrize("source", ["parquet", "hub"])
def test_a_path_that_datasets_would_take_apart_is_refused(source: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a::b" / "x.parquet", PAIR)
    with pytest.raises(ValueError, match=r"data\.path=.*a::b.*rename it"):
        opened(file.parent, source=source)


def test_rows_that_change_while_they_are_opened_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "x.parquet", PAIR)
    read = datasets.Dataset.from_parquet

    def written_to(*arguments: Any, **options: Any) -> Any:
        write(file, {"image": [png(2)] * 3, "text": ["c"] * 3})
        return read(*arguments, **options)

    monkeypatch.setattr(datasets.Dataset, "from_parquet", written_to)
    with pytest.raises(ValueError, match=r"data\.path=.*x\.parquet: 3 rows were read where its files have 2"):
        opened(file)


def test_a_stream_resolves_paths_and_reports_a_file_that_breaks_off(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    paths = [f"{n}.png" for n in range(3)]
    write(folder / "train-0.parquet", {"image": paths, "text": list("abc")})
    for number, path in enumerate(paths):
        (folder / path).write_bytes(png(number))
    data = DataConfig(source="hub_stream", path=str(folder), train_size=None, val_size=None)
    streams = [open_source(data, split, 16) for split in ("train", "val")]
    found = [read().captions for stream in streams for n in range(stream.shards) for read in stream.shard(n)]
    assert sorted(found) == [["a"], ["b"], ["c"]]
    assert isinstance(streams[0], Stream)
    content = bytearray((folder / "train-0.parquet").read_bytes())
    content[4:40] = b"\xff" * 36
    (folder / "train-0.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.path=.* shard 0 row 0 cannot be read"):
        list(open_source(data, "train", 16).shard(0))


def test_a_cache_below_the_data_is_no_part_of_it(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", {"image": [png(n) for n in range(40)], "text": ["a"] * 40})
    for split in ("train", "val", "train"):
        opened(tmp_path, split, cache_dir=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache" / "parquet").glob("*"))) == 1

"""The identity of data follows its content, and nothing else."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_lm.data import identity
from t2i_lm.data.identity import content_of, local_content

NAMES = st.sampled_from(["metadata.jsonl", "a.jpg", "b.png", "sub/c.jpg", "sub/d.txt", "e.tar", "f.parquet"])
FOLDERS = st.dictionaries(NAMES, st.binary(max_size=6), min_size=1)


@contextmanager
def written(files: dict[str, bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "data")
        for place, content in files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_bytes(content)
        yield folder


@settings(max_examples=60, deadline=None)
@given(FOLDERS, FOLDERS)
def test_folders_are_the_same_data_exactly_if_their_files_are(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    """Whatever differs: a byte, a name, a file more or less; wherever they lie, whenever they were written."""
    with written(one) as first, written(other) as second:
        assert (content_of(str(first)) == content_of(str(second))) == (one == other)


@settings(max_examples=30, deadline=None)
@given(FOLDERS, st.data())
def test_of_large_folders_a_new_modification_time_is_another_content(
    files: dict[str, bytes], data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch, written(files) as folder:
        patch.setattr(identity, "OTHER_BYTES", -1)
        patch.setattr(identity, "CAPTIONED_BYTES", -1)
        before = content_of(str(folder))
        copy = shutil.copytree(folder, folder.with_name("copy"))  # with modification times
        assert content_of(str(copy)) == before
        name = data.draw(st.sampled_from(sorted(files)))
        os.utime(folder / name, ns=(1, 1))
        assert content_of(str(folder)) != before


def test_a_copy_without_its_times_is_equal_content_where_times_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "OTHER_BYTES", -1)
    (tmp_path / "a.jpg").write_text("large")
    before = local_content(str(tmp_path), ())
    assert before is not None
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    assert local_content(str(tmp_path), ()) == before
    (tmp_path / "a.jpg").write_text("larger")
    assert local_content(str(tmp_path), ()) != before
    assert local_content(str(tmp_path / "nothing"), ()) is None


def test_captions_of_large_folders_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "OTHER_BYTES", 2)
    table, image = tmp_path / "metadata.jsonl", tmp_path / "a.jpg"
    table.write_text("a cat")
    image.write_text("large")
    before = content_of(str(tmp_path))
    times = table.stat().st_mtime_ns
    table.write_text("a dog")
    os.utime(table, ns=(times, times))
    assert content_of(str(tmp_path)) != before


def test_an_image_that_is_replaced_with_its_size_and_time_is_other_content_where_bytes_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "a.jpg"
    found = []
    for limit in (identity.OTHER_BYTES, 1):
        monkeypatch.setattr(identity, "OTHER_BYTES", limit)
        for content in (b"one", b"two"):
            image.write_bytes(content)
            os.utime(image, ns=(5, 5))
            found.append(content_of(str(tmp_path)))
    small, other, large, same = found
    assert small != other
    assert large == same  # of more images than are read, their sizes and times count, as the documentation says


def test_a_file_is_its_content_whatever_its_name(tmp_path: Path) -> None:
    for name, text in (("a.txt", "one"), ("b.txt", "one"), ("c.txt", "two")):
        (tmp_path / name).write_text(text)
    a, b, c = (content_of(str(tmp_path / name)) for name in ("a.txt", "b.txt", "c.txt"))
    assert a == b != c


def test_caches_and_hidden_files_are_no_data_and_links_are_followed(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data, elsewhere):
        folder.mkdir()
        (folder / "a.jpg").write_text("a")
    before = content_of(str(data), [data / "cache"])
    (data / "cache").mkdir()
    (data / "cache" / "index.json").write_text("{}")
    (data / ".DS_Store").write_text("x")
    assert content_of(str(data), [data / "cache"]) == before
    (data / "more").symlink_to(elsewhere)
    (data / "circle").symlink_to(data)
    linked = content_of(str(data), [data / "cache"])
    assert linked != before
    (elsewhere / "a.jpg").write_text("b")
    assert content_of(str(data), [data / "cache"]) != linked
    (elsewhere / "a.jpg").unlink()
    (data / "gone.jpg").symlink_to(tmp_path / "nothing")
    assert content_of(str(data), [data / "cache"]) not in (before, linked)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "parquet struct"])
@pytest.mark.parametrize(
    "name",
    [
        *("photos/my a.jpg", "../photos/my a.jpg", "{root}/photos/my a.jpg"),
        *("photos/o'brien.jpg", "photos/a, b.jpg", "photos/café.jpg", "photos/a.ppm", "photos/none"),
    ],
)
def test_images_that_a_table_names_are_part_of_it(tmp_path: Path, kind: str, name: str) -> None:
    table = tmp_path / ("tables" if name.startswith("..") else ".") / f"table.{kind.split()[0]}"
    image = tmp_path / "photos" / Path(name).name
    for file in (table, image):
        file.parent.mkdir(exist_ok=True)
    image.write_bytes(b"one")
    name = name.format(root=tmp_path)
    if kind == "jsonl":
        table.write_text(json.dumps({"file_name": name, "caption": "a photo, x.jpg"}) + "\n")
    elif kind == "csv":
        table.write_text(f'file_name,caption\n"{name}",a photo\n')
    else:
        cell = name if kind == "parquet" else {"bytes": None, "path": name}
        datasets.Dataset.from_dict({"image": [cell, cell], "caption": ["a", "b"]}).to_parquet(str(table))
    before = content_of(str(table))
    image.write_bytes(b"two")
    assert content_of(str(table)) != before


def test_what_is_nowhere_has_no_content_and_a_dataset_its_cached_commit_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert content_of(str(tmp_path / "absent")) is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert content_of("some/name:train", hub=True) is None  # no network in tests
    refs = tmp_path / "datasets--some--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0123abc")
    assert content_of("some/name", hub=True) == content_of("some/name:train", hub=True) == "commit 0123abc"
    assert content_of("some/name:test", hub=True) == "commit 0123abc:test"


def test_columns_that_hold_no_image_name_are_no_obstacle(tmp_path: Path) -> None:
    rows = [{"image": b"x", "caption": "a", "objects": [{"name": "dog"}], "m.name": "x", "meta": {"file": "a.jpg"}}] * 2
    (tmp_path / "a.jpg").write_bytes(b"one")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    before = content_of(str(tmp_path / "x.parquet"))
    (tmp_path / "a.jpg").write_bytes(b"two")
    assert content_of(str(tmp_path / "x.parquet")) != before

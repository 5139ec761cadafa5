"""The split by words in names and by content of images."""

import errno
import os
import random
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
import pytest
from datasets.data_files import get_data_patterns
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from t2i_lm.config.sections import DataConfig
from t2i_lm.data.digests import image_digests, store_path
from t2i_lm.data.identity import content_of
from t2i_lm.data.parquet_files import find_parquet
from t2i_lm.data.splits import (
    SPLITS,
    WORDS,
    files_below,
    held_out,
    in_split_of_stream,
    path_split,
    split_by_content,
    split_files,
    validations_of,
)
from t2i_lm.data.tables import hub_parts
from t2i_lm.data.tars import find_tars
from t2i_lm.data.text import read_documents

OURS = {"train": "train", "validation": "val", "test": "test"}


@pytest.mark.parametrize("word", [word for words in WORDS.values() for word in words])
@pytest.mark.parametrize(
    "pattern",
    ["{}.tar", "{}-00000-of-00002.tar", "my_{}.tar", "x.{}.0.tar", "{}2014/x.tar", "a/{}/b/x.tar", "my {}/x.tar"],
)
def test_every_word_of_datasets_names_a_split_where_it_does_there(word: str, pattern: str, tmp_path: Path) -> None:
    path = tmp_path / pattern.format(word)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    (theirs,) = get_data_patterns(str(tmp_path))
    ours = path_split(PurePosixPath(pattern.format(word)))
    assert ours == OURS[str(theirs)] == next(split for split, words in WORDS.items() if word in words)


@pytest.mark.parametrize("name", ["trains.tar", "contest.tar", "evaluate.tar", "devil/x.tar", "trainval.tar", "0.tar"])
def test_words_inside_other_words_name_no_split(name: str) -> None:
    assert path_split(PurePosixPath(name)) is None


def test_folders_count_more_than_file_names_and_case_does_not_matter() -> None:
    assert path_split(PurePosixPath("Train/test-images.tar")) == "train"
    assert path_split(PurePosixPath("VAL.parquet")) == "val"
    for path in ("train/val/x.tar", "train-val.tar"):
        with pytest.raises(ValueError, match="names several splits: train and val"):
            path_split(PurePosixPath(path))


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["a", "b"], ["a", "b"], ["a", "b"]),
        (["train-0", "train-1", "dev-0"], ["train-0", "train-1"], ["dev-0"]),
        (["train/0", "valid/0", "test/0"], ["train/0"], ["valid/0"]),
        (["train-0", "test-0"], ["train-0"], ["train-0"]),
    ],
)
def test_files_of_a_split_are_found_by_name(names: list[str], train: list[str], val: list[str], tmp_path: Path) -> None:
    write_names(tmp_path, names)
    data = DataConfig(source="webdataset", path=str(tmp_path))
    for split, expected in (("train", train), ("val", val)):
        files = split_files(data, split, tars_below)
        assert [str(file.relative_to(tmp_path)) for file in files.files] == [f"{name}.tar" for name in expected]
        assert files.automatic == (train == val)
        assert ("left out: test" in " ".join(files.notes)) == ("test" in " ".join(names))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-0", "more"], r"some names say the split and others do not.*training: train-0.*no split: more"),
        (["val-0", "a", "b", "c", "d"], r"no split: a.tar and 3 more"),
        (["test-0"], r"no training data by name \(test: test-0"),
        (["val-0", "test-0"], r"no training data by name"),
        (["train/val/0"], r"names several splits"),
    ],
)
def test_files_of_unknown_splits_are_refused_with_their_names(names: list[str], message: str, tmp_path: Path) -> None:
    write_names(tmp_path, names)
    for split in SPLITS:
        with pytest.raises(ValueError, match=rf"data\.path=.*{message}"):
            split_files(DataConfig(source="webdataset", path=str(tmp_path)), split, tars_below)


def test_val_path_may_have_any_name_and_data_path_still_leaves_out_what_it_names(tmp_path: Path) -> None:
    write_names(tmp_path, ["all/train-0", "all/val-0", "other/test-0"])
    data = DataConfig(source="webdataset", path=str(tmp_path / "all"), val_path=str(tmp_path / "other"))
    train, val = (split_files(data, split, tars_below) for split in SPLITS)
    assert ([file.name for file in train.files], train.automatic) == (["train-0.tar"], False)
    assert "left out: validation" in train.notes[0]
    assert ([file.name for file in val.files], val.automatic, val.notes) == (["test-0.tar"], False, [])
    one = DataConfig(source="webdataset", path=str(tmp_path / "all" / "val-0.tar"))
    assert split_files(one, "train", tars_below).automatic


@pytest.mark.parametrize(
    ("names", "first", "automatic"),
    [
        (["all/train-0", "all/val-0"], ["val-0.tar"], False),  # by name
        (["all/0", "all/1"], ["0.tar", "1.tar"], True),  # by content
    ],
)
def test_a_second_held_out_set_leaves_the_first_as_it_is(
    names: list[str], first: list[str], automatic: bool, tmp_path: Path
) -> None:
    write_names(tmp_path, [*names, "other/train-0"])
    alone = DataConfig(source="webdataset", path=str(tmp_path / "all"))
    both = replace(alone, second_val_path=str(tmp_path / "other"))
    assert (validations_of(alone), validations_of(both)) == (("val",), ("val/first", "val/second"))
    assert split_files(alone, "val", tars_below) == split_files(both, "val/first", tars_below)
    found = split_files(both, "val/first", tars_below)
    assert ([file.name for file in found.files], found.automatic) == (first, automatic)
    second = split_files(both, "val/second", tars_below)
    assert ([file.name for file in second.files], second.automatic) == (["train-0.tar"], False)
    file = replace(both, second_val_path=str(tmp_path / "other" / "train-0.tar"))
    assert not split_files(file, "val/second", tars_below).automatic
    with pytest.raises(ValueError, match=r"data\.second_val_path=.*absent: no such file or folder"):
        split_files(replace(both, second_val_path=str(tmp_path / "absent")), "val/second", tars_below)


def write_names(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.tar").touch()


def tars_below(folder: Path) -> list[Path]:
    return files_below(folder, lambda name: name.endswith(".tar"))


def test_hidden_and_special_files_are_not_data_and_linked_folders_are(tmp_path: Path) -> None:
    write_names(tmp_path / "data", [".cache/0", "__MACOSX/0", "._0", "a/0"])
    write_names(tmp_path / "elsewhere", ["1"])
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    found = [str(file.relative_to(tmp_path / "data")) for file in tars_below(tmp_path / "data")]
    assert found == ["a/0.tar", "link/1.tar"]


# Few digests, so that rows share images.
rows = st.lists(st.one_of(st.none(), st.integers(0, 50).map(lambda n: f"{n * 7919 % 2**64:032x}")), max_size=120)


@settings(deadline=None)
@given(digests=rows, seed=st.integers(0, 9))
def test_the_split_follows_the_image_and_not_the_row(digests: list[str | None], seed: int) -> None:
    distinct = set(digests) - {None}
    if len(distinct) < 2:
        with pytest.raises(ValueError, match=rf"x: {len(distinct)} distinct readable image"):
            split_by_content(digests, "val", "x")
        return
    train, val = (split_by_content(digests, split, "x") for split in SPLITS)
    assert sorted(train + val) == list(range(len(digests)))
    held = {digests[index] for index in val}
    assert len(held) == max(1, len(distinct) // 20)
    assert None not in held
    assert not held & {digests[index] for index in train}
    shuffled = random.Random(seed).sample(digests, len(digests))
    assert {shuffled[index] for index in split_by_content(shuffled, "val", "x")} == held
    assert held_out(digests + digests) == held


@settings(deadline=None)
@given(st.binary(min_size=16, max_size=16))
def test_a_streamed_sample_is_in_exactly_one_split(digest: bytes) -> None:
    assert [in_split_of_stream(digest.hex(), split) for split in SPLITS].count(True) == 1
    assert in_split_of_stream(None, "train")


def test_digests_are_kept_until_a_file_changes(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files[:2]):
        Image.fromarray(np.full((2, 2, 3), number, np.uint8)).save(file)
    files[1].write_bytes(files[1].read_bytes() + b"more")
    store = store_path(str(tmp_path / "cache"), "image", tmp_path)
    first = image_digests(files, store)
    assert first[0] is not None
    assert first[0] != first[1]
    assert first[2] is None
    content, state = files[0].read_bytes(), files[0].stat()
    store.write_text(store.read_text().replace(first[0], "f" * 32))
    assert image_digests(files, store)[0] == "f" * 32
    files[0].write_bytes(content)
    times = (state.st_atime_ns, state.st_mtime_ns + 1)
    os.utime(files[0], ns=times)
    assert image_digests(files, store) == first
    store.write_text("{")
    assert image_digests(files, store) == first


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of folders that cannot be listed, by whatever user."""
    names, scandir = set[str](), os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name in names:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return names


READERS = {"text": lambda folder: list(read_documents(str(folder))), "tars": find_tars, "Parquet": find_parquet}


@pytest.mark.parametrize("kind", READERS)
def test_folders_that_cannot_be_listed_and_links_to_nothing_are_named(
    kind: str, tmp_path: Path, unlisted: set[str]
) -> None:
    data = tmp_path / "data"
    (data / "val").mkdir(parents=True)
    for name in ("a.txt", "a.tar", "a.parquet"):
        (data / name).touch()
    before = content_of(str(data))
    READERS[kind](data)
    unlisted.add("val")
    assert content_of(str(data)) != before  # the reader names it
    with pytest.raises(ValueError, match=r"data/val: a folder that cannot be listed \(Permission denied\); repair it"):
        READERS[kind](data)
    (data / "val").rename(data / ".val")
    (data / "lost+found").mkdir()
    unlisted.update((".val", "lost+found"))
    for name in ("README.md", "picture.svg"):
        (data / name).symlink_to(tmp_path / "gone")
    READERS[kind](data)
    for name in ("more", "v1.2"):
        (data / name).symlink_to(tmp_path / "gone")
        with pytest.raises(ValueError, match=rf"data/{name}: a link to .*gone, which cannot be reached; repair it"):
            READERS[kind](data)
        (data / name).unlink()


@pytest.mark.parametrize(
    ("names", "train", "val", "left_out"),
    [
        (["train", "validation", "test"], "train", "validation", "test"),
        (["train", "val", "extra"], "train", "val", "extra"),
        (["training", "dev"], "training", "dev", None),
        (["train", "test"], "train", None, "test"),
        (["train", "validation", "validation_extra"], "train", "validation", "validation_extra"),
    ],
)
def test_splits_of_the_hub_are_chosen_by_name(
    names: list[str], train: str, val: str | None, left_out: str | None
) -> None:
    parts = hub_parts({name: name for name in names}, "x")
    assert (parts.train, parts.val) == (train, val)
    assert any(f"left out: split {left_out}" in note for note in parts.notes) == (left_out is not None)
    assert parts.part("val") == ((train, True) if val is None else (val, False))


@pytest.mark.parametrize(
    ("names", "message"),
    [(["all"], "no split named train; it has all"), (["train", "val", "dev"], "val and dev could")],
)
def test_splits_of_the_hub_that_cannot_be_told_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hub_parts({name: name for name in names}, "x")


def test_words_are_those_of_datasets() -> None:
    theirs = {OURS[str(split)]: set(words) for split, words in datasets.data_files.SPLIT_KEYWORDS.items()}
    assert {split: set(words) for split, words in WORDS.items()} == theirs

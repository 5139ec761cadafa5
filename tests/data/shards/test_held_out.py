"""Validation images that recur in training are counted, stored and refused."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig
from t2i_lm.data.shards.format import (
    data_hash,
    pair_features,
    part_folder,
    read_index,
    read_part,
    validation_splits,
    write_index,
    write_part,
)
from t2i_lm.data.shards.held_out import recurring_images, recurring_of, require_held_out

ROWS = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=2), min_size=1, max_size=8)


def write(folder: Path, splits: dict[str, list[list[int]]]) -> None:
    """Shards of images by their ids, in parts of three."""
    index: dict[str, Any] = {"tokenizers": {}, "splits": {}}
    for split, images in splits.items():
        index["splits"][split] = {"rows": len(images), "parts": []}
        for number, start in enumerate(range(0, len(images), 3)):

            def rows(start: int = start, split: str = split) -> Iterator[dict[str, Any]]:
                for row, ids in enumerate(splits[split][start : start + 3], start=start):
                    yield {"id": f"{split} {row}", "image_ids": ids, "text_ids": [[1]], "meaning": ""}

            target = part_folder(folder, split, number)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_part(target, rows, pair_features(100, len(images[0]), 8), dict)
            index["splits"][split]["parts"].append(read_part(target)["sha256"])
    write_index(folder, index)


@settings(max_examples=12, deadline=None)
@given(ROWS, ROWS)
def test_every_validation_image_with_a_twin_counts(train: list[list[int]], val: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), {"train": train, "val": val})
        found = recurring_images(Path(name))["val"]
        places = [row for row, image in enumerate(val) if image in train]
        assert found["images"] == len(places)
        if places:
            assert found["first"] == [f"val {places[0]}", f"train {train.index(val[places[0]])}"]


@pytest.fixture
def recurring(tmp_path: Path) -> Path:
    """One of four validation images is a training image."""
    write(tmp_path, {"train": [[number, 0] for number in range(5)], "val": [[number, 0] for number in range(4, 8)]})
    return tmp_path


def test_they_are_refused_above_the_share_that_a_key_allows(recurring: Path) -> None:
    before = data_hash(read_index(recurring) or {})
    config = ExperimentConfig(data=DataConfig(source="image_folder", path="x"))
    with pytest.raises(ValueError, match=r"1 of 4 validation images .*: val 0, of train 4\).*max_recurring_share=0"):
        require_held_out(config, recurring)
    require_held_out(replace(config, data=replace(config.data, max_recurring_share=0.25)), recurring)
    index = read_index(recurring) or {}
    assert index["recurring"] == {"images": 1, "first": ["val 0", "train 4"]}
    assert index["data_hash"] == before == data_hash(index)


def test_an_index_of_an_older_version_gets_its_digest_which_is_said_once(
    recurring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_held_out(ExperimentConfig(), recurring)
    file, index = recurring / "index.json", read_index(recurring) or {}
    capsys.readouterr()
    former = {key: value for key, value in index.items() if key != "digest"}
    file.write_text(json.dumps(former))
    for _ in range(2):
        require_held_out(ExperimentConfig(), recurring)
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{file} is of an older version, without a digest of its own" in said
    assert read_index(recurring) == index
    former["parts"]["train"][0]["rows"] = 7
    file.write_text(json.dumps(former))
    with pytest.raises(ValueError, match=rf"{file} is damaged: 9 rows in 2 parts of train, not 5 in 2"):
        require_held_out(ExperimentConfig(), recurring)


def test_every_validation_split_is_counted(tmp_path: Path) -> None:
    numbers = {"train": range(5), "val/iid": range(4, 8), "val/compositional": range(3, 9)}
    write(tmp_path, {split: [[number % 8, 1] for number in places] for split, places in numbers.items()})
    assert validation_splits(tmp_path) == ("val/iid", "val/compositional")
    require_held_out(ExperimentConfig(), tmp_path)
    index = read_index(tmp_path) or {}
    assert {split: found["images"] for split, found in recurring_of(index).items()} == {
        "val/iid": 1,
        "val/compositional": 3,
    }
    assert index["recurring"]["val/compositional"]["first"] == ["val/compositional 0", "train 3"]


def test_generated_scenes_are_only_counted(recurring: Path) -> None:
    require_held_out(ExperimentConfig(), recurring)
    assert (read_index(recurring) or {})["recurring"]["images"] == 1

"""Parts of a split: opened and verified when they are first read, and never used damaged."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig, TrainerConfig
from t2i_lm.data.datamodules import PairBatches, PairDataModule
from t2i_lm.data.shards.format import PARTS, part_folder, read_index, write_index
from t2i_lm.data.shards.parts import PartError, Parts, open_split
from t2i_lm.storage.sealed import DIGEST
from t2i_lm.tokenizers.layout import IntArray
from tests.data.shards.pair_shards import LAYOUT, write_pairs

DATA = DataConfig(length=LAYOUT.length, batch_size=8)


def arrow(folder: Path, split: str, number: int) -> Path:
    (file,) = part_folder(folder, split, number).glob("*.arrow")
    return file


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def bytes_read() -> int:
    """Bytes that this process has read by system calls; 0 where the system does not tell."""
    io = Path("/proc/self/io")
    return int(io.read_text().split("rchar:")[1].split()[0]) if io.exists() else 0


def test_opening_256_gib_reads_the_index_alone(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    for split in ("train", "val"):
        (entry,) = {json.dumps(part) for part in index[PARTS][split][:1]}
        for number in range(len(index[PARTS][split]), 128):
            target = part_folder(tmp_path, split, number)
            target.mkdir()
            with (target / "data.arrow").open("wb") as file:
                file.truncate(2**30)  # sparse
            index["splits"][split]["parts"].append({"data.arrow": "0" * 64})
            index[PARTS][split].append(json.loads(entry) | {"bytes": {"data.arrow": 2**30}})
        index["splits"][split]["rows"] = sum(part["rows"] for part in index[PARTS][split])
    write_index(tmp_path, index)
    before, start = bytes_read(), time.perf_counter()
    data = PairDataModule(ExperimentConfig(data=DATA), tmp_path, LAYOUT)
    data.setup("fit")
    assert bytes_read() - before < 2**20
    assert time.perf_counter() - start < 5
    assert len(data.train_set) > 128 * 30 - 50
    ids_BT = data.train_set.__getitems__([(0, 0), (0, 111)])["ids_BT"]
    assert ids_BT[1][ids_BT[1] >= LAYOUT.vocab.image_offset].tolist()[1] == LAYOUT.vocab.image_offset + 111


def test_a_damaged_part_is_named_when_it_is_read_and_the_others_are_read(tmp_path: Path) -> None:
    damage(arrow(write_pairs(tmp_path), "train", 1))
    train = PairBatches(Parts(tmp_path, "train"), LAYOUT, "first", 0, 1)
    assert len(train.__getitems__([(0, 29), (0, 60)])["ids_BT"]) == 2
    message = rf"token shard {arrow(tmp_path, 'train', 1)} is damaged: its sha256 differs .*; delete {tmp_path} to"
    for _ in range(2):
        with pytest.raises(PartError, match=message):
            train.__getitems__([(0, 30)])
    with pytest.raises(ValueError, match=message):
        open_split(tmp_path, "train")


def test_a_worker_says_it_in_one_line_too(tmp_path: Path) -> None:
    damage(arrow(write_pairs(tmp_path), "train", 1))
    train = PairBatches(Parts(tmp_path, "train"), LAYOUT, "first", 0, 1)
    batches = [[(0, row)] for row in (0, 59)]
    loader = DataLoader(train, batch_sampler=batches, collate_fn=lambda batch: batch, num_workers=1)
    with pytest.raises(PartError, match="is damaged") as error:
        list(loader)
    assert str(error.value).startswith("token shard ")
    assert len(str(error.value).splitlines()) == 1


def test_missing_and_cut_files_are_named_at_the_start(tmp_path: Path) -> None:
    file = arrow(write_pairs(tmp_path), "train", 3)
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=rf"{file} is damaged: {len(content) - 8:,} bytes, index\.json says "):
        Parts(tmp_path, "train")
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing; delete {tmp_path} to prepare it again"):
        Parts(tmp_path, "train")


def test_an_index_of_an_older_version_is_completed_from_the_parts(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    index = read_index(tmp_path) or {}
    del index[PARTS], index[DIGEST]
    (tmp_path / "index.json").write_text(json.dumps(index))
    parts = Parts(tmp_path, "train")
    assert parts.rows.tolist() == [30, 30, 17, 30, 5]
    assert parts.captions is not None
    assert parts.captions.sum() == sum(1 + row % 3 for row in range(112))


def test_one_worker_verifies_for_all(tmp_path: Path) -> None:
    parts = Parts(write_pairs(tmp_path), "train")
    train = PairBatches(parts, LAYOUT, "first", 0, 1)
    batches = [[(0, row)] for row in (0, 31, 76)]
    assert len(list(DataLoader(train, batch_sampler=batches, collate_fn=lambda batch: batch, num_workers=2))) == 3
    assert parts._verified.bool().tolist() == [1, 1, 1, 0, 0]
    assert pickle.loads(pickle.dumps(train)).part_sizes.tolist() == [30, 30, 17, 30, 5]


def cut(file: Path) -> None:
    """Shortens a file in place; reading a map of it beyond its end would end the process."""
    os.truncate(file, file.stat().st_size // 2)


def zero(file: Path) -> None:
    with file.open("r+b") as open_file:
        open_file.write(bytes(file.stat().st_size))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", [cut, zero])
def test_a_part_that_changes_while_it_is_mapped_is_named(
    tmp_path: Path, change: Callable[[Path], None], workers: int
) -> None:
    train = PairBatches(Parts(write_pairs(tmp_path), "train"), LAYOUT, "first", 0, 1)
    batches = ([(0, row), (0, 60)] for row in range(30, 56))
    loader = iter(DataLoader(train, batch_sampler=list(batches), collate_fn=lambda batch: batch, num_workers=workers))
    next(loader)
    change(arrow(tmp_path, "train", 1))
    with pytest.raises(PartError, match=rf"^token shard {arrow(tmp_path, 'train', 1)} is damaged: its sha256 differs"):
        list(loader)


def test_a_change_during_the_read_of_a_batch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(write_pairs(tmp_path), "train")
    train = PairBatches(parts, LAYOUT, "first", 0, 1)
    caption = train.columns.caption

    def changing(row: int, number: int) -> IntArray:
        zero(arrow(tmp_path, "train", 0))
        return caption(row, number)

    train.__getitems__([(0, 1)])
    monkeypatch.setattr(train.columns, "caption", changing)
    with pytest.raises(PartError, match=r"part-00000.*is damaged"):
        train.__getitems__([(0, 1)])


def test_a_file_that_was_replaced_by_its_copy_is_mapped_anew(tmp_path: Path) -> None:
    """Zeroed and restored under another inode between two batches: the old map must not be read."""
    file = arrow(write_pairs(tmp_path), "train", 0)
    parts = Parts(tmp_path, "train")
    train, split = PairBatches(parts, LAYOUT, "first", 0, 1), parts.dataset()
    before, rows = train.__getitems__([(0, 1)])["ids_BT"], split[:2]["image_ids"].copy()
    shutil.copyfile(file, tmp_path / "copy")
    zero(file)
    assert not (split[:2]["image_ids"] == rows).all()
    (tmp_path / "copy").replace(file)
    assert train.__getitems__([(0, 1)])["ids_BT"].equal(before)
    with pytest.raises(PartError, match=rf"{file} was replaced under the run; resume it"):
        parts.require_unchanged()
    file.touch()
    again = Parts(tmp_path, "train")
    again.dataset()
    file.touch()
    again.require_unchanged()
    cut(file)
    with pytest.raises(PartError, match=rf"{file} is damaged"):
        again.require_unchanged()


def test_a_touched_copied_or_deleted_file_is_read_on(tmp_path: Path) -> None:
    file = arrow(write_pairs(tmp_path), "train", 0)
    train = PairBatches(Parts(tmp_path, "train"), LAYOUT, "first", 0, 1)
    before = train.__getitems__([(0, 1)])["ids_BT"]
    content = file.read_bytes()
    for change in (file.touch, file.unlink, lambda: file.write_bytes(content)):
        change()
        assert train.__getitems__([(0, 1)])["ids_BT"].equal(before)


@pytest.mark.parametrize("captions", ["first", "all"])
def test_every_sample_is_read_once_an_epoch_part_by_part(tmp_path: Path, captions: str) -> None:
    """The same batches, whether the index counts the captions of parts or they are counted."""
    write_pairs(tmp_path)
    data = PairDataModule(
        ExperimentConfig(
            data=replace(DATA, captions=captions, shuffle_parts=2, batch_size=1), trainer=TrainerConfig(max_steps=9000)
        ),
        tmp_path,
        LAYOUT,
    )
    data.setup("fit")
    counts = [1 if captions == "first" else 1 + row % 3 for row in range(112)]
    assert data.train_set.part_sizes.tolist() == [
        sum(counts[start:stop]) for start, stop in ((0, 30), (30, 60), (60, 77), (77, 107), (107, 112))
    ]
    ids_BT = data.train_set.__getitems__([(0, index) for index in range(sum(counts))])["ids_BT"]
    image_B4 = torch.stack([row[row >= LAYOUT.vocab.image_offset] for row in ids_BT]) - LAYOUT.vocab.image_offset
    assert image_B4[:, 1].tolist() == [row for row, count in enumerate(counts) for _ in range(count)]

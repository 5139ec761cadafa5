"""Checkpoints of sharded runs: each rank writes its part, and any number of ranks goes on from them."""

import os
import random
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from callbacks import CorruptCheckpointError, EventLog, find_resumable
from callbacks.checkpoints import checkpoint_path, checkpoints, step_of
from callbacks.files.checkpoint_io import leftovers, verify
from callbacks.files.checkpoint_parts import PARTS, part_files, read_checkpoint
from tests.callbacks.test_resume import KILLED, assert_equal_but_for_rounding, litter, split_lines
from tests.callbacks.toy_model import Toy
from tests.callbacks.toy_run import CHECKPOINTS, EVENTS, finish, free_port, lines, run_to_end, start

pytestmark = pytest.mark.slow

# Runs of which one rank is killed at a seeded operation of its saves; more of them with T2I_LM_KILLS=200.
SEEDS = range(int(os.environ.get("T2I_LM_KILLS", "10")) // 5)


def start_shards(folder: Path, *harms: dict[str, Any], **options: Any) -> list[BaseProcess]:
    """Both ranks of a sharded run; `harms` are those of each."""
    same: dict[str, Any] = {"world": 2, "port": free_port(), "strategy": "fsdp2", "plain": True, **options}
    return [start(Toy(folder, rank=rank, harm=harm, **same)) for rank, harm in enumerate(harms or ({}, {}))]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken sharded run."""
    folder = tmp_path_factory.mktemp("shards")
    assert finish(*start_shards(folder, keep_steps=(7,))) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    assert run_to_end(Toy(folder, plain=True)) == 0
    return folder


def test_each_rank_writes_its_part_and_nothing_else_is_left(shards: Path, alone: Path) -> None:
    assert_equal_but_for_rounding(split_lines(shards), split_lines(alone))
    files = checkpoints(shards / CHECKPOINTS)
    assert [step_of(path) for path in files] == [7, 20, 24]
    assert litter(shards) == leftovers(shards / CHECKPOINTS) == []
    verify(files.pop(0))
    for path, other in zip(files, checkpoints(alone / CHECKPOINTS), strict=True):
        verify(path)
        parts = part_files(path)
        assert [part.name.split("-of-")[0][-5:] for part in parts] == ["00000", "00001"]
        whole, expected = read_checkpoint(path), read_checkpoint(other)
        assert whole.keys() == expected.keys()
        assert PARTS not in whole
        assert whole["state_dict"].keys() == expected["state_dict"].keys()
        for name, value in expected["state_dict"].items():
            assert whole["state_dict"][name].shape == value.shape
            assert whole["state_dict"][name].sub(value).abs().max() < 1e-4
        for key, entry in expected["optimizer_states"][0]["state"].items():
            assert whole["optimizer_states"][0]["state"][key]["exp_avg"].shape == entry["exp_avg"].shape
        assert list(read_checkpoint(path, mmap=True, only="state_dict")) == ["state_dict"]


@pytest.mark.parametrize("first", ["shards", "ddp", "alone"])
def test_a_run_goes_on_under_another_strategy_and_number_of_ranks(alone: Path, tmp_path: Path, first: str) -> None:
    harm: dict[str, Any] = {"signal_in": "step", "at_step": 13, "signal": signal.SIGTERM}
    two = {"world": 2, "plain": True}
    if first == "shards":
        assert finish(*start_shards(tmp_path, harm, harm)) == [143, 143]
        assert run_to_end(Toy(tmp_path, plain=True)) == 0
    elif first == "ddp":
        port = free_port()
        ranks = [start(Toy(tmp_path, rank=rank, port=port, harm=harm, **two)) for rank in range(2)]
        assert finish(*ranks) == [143, 143]
        assert finish(*start_shards(tmp_path)) == [0, 0]
    else:
        assert run_to_end(Toy(tmp_path, plain=True, harm=harm)) == 143
        assert finish(*start_shards(tmp_path)) == [0, 0]
    assert_equal_but_for_rounding(split_lines(tmp_path), split_lines(alone))


@pytest.mark.parametrize("killed", [0, 1], ids=["rank 0", "rank 1"])
def test_a_rank_killed_inside_its_write_leaves_nothing_that_is_read(shards: Path, tmp_path: Path, killed: int) -> None:
    harms: list[dict[str, Any]] = [{"signal_in": "step", "at_step": 11, "signal": signal.SIGKILL, "ranks": [0, 1]}] * 2
    harms[killed] = harms[killed] | {"slow_write": 0.002}
    assert finish(*start_shards(tmp_path, *harms)) == [KILLED, KILLED]
    assert [step_of(path) for path in checkpoints(tmp_path / CHECKPOINTS)] == [5]
    assert leftovers(tmp_path / CHECKPOINTS)
    assert finish(*start_shards(tmp_path)) == [0, 0]
    assert lines(tmp_path) == lines(shards)
    assert litter(tmp_path) == leftovers(tmp_path / CHECKPOINTS) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_killed_at_any_operation_of_its_saves(shards: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    harms: list[dict[str, Any]] = [{}, {}]
    # A rank writes a part in each of five saves, rank 0 a main file too.
    harms[seed % 2] = {"at_operation": draw.randint(1, 150), "slow_write": draw.choice([0.0, 0.001])}
    processes = start_shards(tmp_path, *harms)
    processes[seed % 2].join(60)
    processes[1 - seed % 2].join(5)  # without its peer, by an error of gloo
    for process in processes:
        process.kill()
    assert finish(*processes)[seed % 2] == KILLED
    assert finish(*start_shards(tmp_path)) == [0, 0]
    assert lines(tmp_path) == lines(shards)
    assert litter(tmp_path) == leftovers(tmp_path / CHECKPOINTS) == []


@pytest.mark.parametrize("full", [0, 1], ids=["rank 0", "rank 1"])
def test_a_full_disk_on_one_rank_fails_the_save_on_both_and_the_run_goes_on(
    shards: Path, tmp_path: Path, full: int
) -> None:
    harms: list[dict[str, Any]] = [{}, {}]
    harms[full] = {"at_operation": 20, "then": "full"}
    assert finish(*start_shards(tmp_path, *harms)) == [0, 0]
    events = EventLog(tmp_path / EVENTS).read()
    assert [kind for _, kind, _ in events] == ["save-failed"]
    assert "No space left on device" in events[0][2]
    assert events[0][2].startswith("rank 1: ") == (full == 1)
    assert lines(tmp_path) == lines(shards)
    assert litter(tmp_path) == leftovers(tmp_path / CHECKPOINTS) == []


@pytest.mark.parametrize("harm", ["lost", "damaged", "all lost"])
def test_a_lost_or_damaged_part_makes_a_checkpoint_unreadable(shards: Path, tmp_path: Path, harm: str) -> None:
    for file in (shards / CHECKPOINTS).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    newest = checkpoint_path(tmp_path, 24)
    parts = part_files(newest)
    if harm == "damaged":
        content = bytearray(parts[1].read_bytes())
        content[len(content) // 2] ^= 1
        parts[1].write_bytes(content)
    for part in parts[1:] if harm == "lost" else parts if harm == "all lost" else ():
        part.unlink()
    message = "do not match its digest" if harm == "damaged" else "is missing"
    with pytest.raises(CorruptCheckpointError, match=message):
        verify(newest)
    assert find_resumable(tmp_path) == checkpoint_path(tmp_path, 20)

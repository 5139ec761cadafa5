"""Checkpoints that a thread writes while training goes on."""

import hashlib
import itertools
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

import callbacks.checkpoints
import callbacks.files.staging
from callbacks import EventLog, find_resumable
from callbacks.checkpoints import checkpoint_path, checkpoints, step_of
from callbacks.files.checkpoint_io import write
from tests.callbacks.test_checkpoints import Unreadable, fit, saved_steps
from tests.callbacks.toy_model import Toy
from tests.callbacks.toy_run import CHECKPOINTS, EVENTS, METRICS, finish, lines, run_to_end, start

PARAMETERS = ("rows.weight", "head.weight", "head.bias")


class Slow:
    """A disk on which each file takes some time; notes when the writing of each step began and ended."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.spans = seconds, dict[int, tuple[float, float]]()
        monkeypatch.setattr(callbacks.checkpoints, "write", self.write)

    def write(self, content: dict[str, Any], target: Path) -> None:
        began = time.perf_counter()
        time.sleep(self.seconds)  # before the first byte: the worst case for a copy that is none
        write(content, target)
        self.spans[step_of(target)] = began, time.perf_counter()


class Watch(Callback):
    """Notes the time of each step, and the threads that write during it."""

    def __init__(self) -> None:
        self.times, self.writing = list[float](), list[int]()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.times.append(time.perf_counter())
        self.writing.append(sum(thread.name.startswith("save ") for thread in threading.enumerate()))


def of_parameters(path: Path) -> str:
    """The fingerprint of the parameters in a checkpoint, as the witness of a toy run writes it."""
    state, digest = torch.load(path, weights_only=True)["state_dict"], hashlib.sha256()
    for name in PARAMETERS:
        digest.update(state[name].numpy().tobytes())
    return digest.hexdigest()


def test_steps_go_on_while_a_file_is_written_that_holds_the_values_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, watch = Slow(0.1, monkeypatch), Watch()
    toy = Toy(tmp_path, steps=13, val_every=100, plain=True)
    monkeypatch.setattr(callbacks.checkpoints.RunCheckpoints, "_remove_old", lambda *_: None)
    trainer = fit(toy, watch)
    assert saved_steps(toy) == [5, 10, 13]
    (saver,) = (one for one in trainer.callbacks if isinstance(one, callbacks.checkpoints.RunCheckpoints))  # type: ignore[attr-defined]
    assert saver._staging.size == 0, "the report needs memory too"
    during = [span for span in disk.spans.values() if any(span[0] < time < span[1] for time in watch.times)]
    assert len(during) == 2, "no step passed while 5 and 10 were written"
    witnesses = {line["step"]: line["witness"]["parameters"] for line in lines(tmp_path) if "witness" in line}
    for path in checkpoints(tmp_path / CHECKPOINTS):
        assert of_parameters(path) == witnesses[step_of(path)]


@pytest.mark.parametrize("background", [True, False])
def test_what_a_save_costs_training_is_in_the_training_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    Slow(1.0, monkeypatch)
    if not background:
        monkeypatch.setattr(callbacks.files.staging, "available_memory", lambda: 0)
    fit(Toy(tmp_path, steps=8))
    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    without, stalled = (line["throughput"] for line in records if "throughput" in line)
    assert "save_stall_s" not in without
    assert stalled["save_stall_s"] < 0.5 if background else stalled["save_stall_s"] >= 1.0


def test_at_most_one_is_in_flight_and_the_last_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, watch = Slow(0.05, monkeypatch), Watch()
    fit(Toy(tmp_path, steps=9, save_every=1, val_every=100), watch)
    assert max(watch.writing) == 1
    spans = sorted(disk.spans.values())
    assert len(spans) == 9
    assert all(one[1] < following[0] for one, following in itertools.pairwise(spans))
    assert not any(thread.name.startswith("save ") for thread in threading.enumerate())
    assert saved_steps(Toy(tmp_path)) == [8, 9]


def test_a_failed_save_is_told_with_path_and_free_space_and_the_next_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = callbacks.files.checkpoint_io._write_hashed

    def full(content: dict[str, Any], path: Path) -> str:
        if content["global_step"] in (5, 10):
            raise OSError(28, "No space left on device")
        return real(content, path)

    monkeypatch.setattr(callbacks.files.checkpoint_io, "_write_hashed", full)
    fit(Toy(tmp_path, steps=17))
    assert saved_steps(Toy(tmp_path)) == [15, 17]
    assert EventLog(tmp_path / EVENTS).counts() == {"save-failed": 2}
    err = capsys.readouterr().err
    full_at = checkpoint_path(tmp_path / CHECKPOINTS, 5)
    assert f"could not write checkpoint {full_at}: No space left on device (" in err
    assert "MB free)" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("error", [RuntimeError("bug"), MemoryError("all of it")], ids=["bug", "memory"])
def test_a_failure_that_would_recur_stops_the_run_before_another_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(content: dict[str, Any], target: Path) -> None:
        raise error

    monkeypatch.setattr(callbacks.checkpoints, "write", fail)
    watch = Watch()
    with pytest.raises(RuntimeError, match=rf"step-00000005.ckpt: {type(error).__name__}: {error}"):
        fit(Toy(tmp_path, steps=17), watch)
    assert len(watch.times) <= 2 * 8, "a step boundary or two after the save"
    assert "Traceback" not in capsys.readouterr().err


def test_an_unreadable_state_stops_before_the_next_save(tmp_path: Path) -> None:
    watch = Watch()
    with pytest.raises(TypeError, match="weights_only=True"):
        fit(Toy(tmp_path, steps=17), watch, Unreadable())
    assert len(watch.times) < 2 * 10
    assert not list((tmp_path / CHECKPOINTS).iterdir())


def test_without_memory_for_a_copy_training_waits_which_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks.files.staging, "available_memory", lambda: 1000)
    watch = Watch()
    fit(Toy(tmp_path, steps=12), watch)
    assert saved_steps(Toy(tmp_path)) == [10, 12]
    assert max(watch.writing) == 0
    assert EventLog(tmp_path / EVENTS).counts() == {"save-synchronous": 1}
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "0.00 GB available: training waits while checkpoints are written" in err


def test_an_error_lets_the_save_in_flight_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Slow(0.2, monkeypatch)
    with pytest.raises(ArithmeticError):
        fit(Toy(tmp_path, harm={"raise_after_update_of": 6}))
    assert saved_steps(Toy(tmp_path)) == [5]
    assert find_resumable(tmp_path / CHECKPOINTS) is not None


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["sigterm", "sigkill"])
def test_a_signal_during_a_write_waits_for_it_or_leaves_nothing_that_is_read(
    tmp_path: Path, number: int, code: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # Step 12 ends while the checkpoint of step 10 is written, which takes some hundred operations.
    harm = {"signal_in": "step", "at_step": 11, "signal": number, "slow_write": 0.002}
    one, other = start(Toy(whole)), start(Toy(broken, harm=harm))
    assert finish(one, other) == [0, code]
    assert saved_steps(Toy(broken)) == ([10, 12] if code > 0 else [5])
    if code < 0:
        assert list((broken / CHECKPOINTS).glob("*.tmp")), "the kill was not inside the write"
    assert run_to_end(Toy(broken)) == 0
    assert lines(broken) == lines(whole)

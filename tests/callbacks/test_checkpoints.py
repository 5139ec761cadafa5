"""Retention of a run's checkpoints, and saves that fail."""

import errno
import os
import shutil
import signal
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

import callbacks.checkpoints
import callbacks.preemption
from callbacks import (
    CorruptCheckpointError,
    DurableCheckpointIO,
    EventLog,
    Preempted,
    Preemption,
    RngState,
    RunCheckpoints,
    find_resumable,
)
from callbacks.checkpoints import checkpoint_path, checkpoints, mark_not_started, step_of, was_not_started
from callbacks.files.checkpoint_io import digest_of, verify
from tests.callbacks.toy_model import Toy
from tests.callbacks.toy_run import CHECKPOINTS, EVENTS, METRICS, build, lines

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def fit(toy: Toy, *more: Callback, resume: Path | None = None) -> pl.Trainer:
    """A run in this process."""
    trainer, module, data = build(toy)
    trainer.callbacks = [*more, *trainer.callbacks]  # type: ignore[attr-defined]
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer


def saved_steps(toy: Toy) -> list[int]:
    """Steps of a run's checkpoints."""
    return [step_of(path) for path in checkpoints(toy.folder / CHECKPOINTS)]


def test_a_run_is_marked_as_not_started_until_its_first_step_alone(tmp_path: Path) -> None:
    """A node may be lost before the first checkpoint, and what is left must not pass for a run that can go on."""
    marked = []

    class Noting(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            marked.append((trainer.global_step, was_not_started(tmp_path / CHECKPOINTS)))

    mark_not_started(tmp_path / CHECKPOINTS)
    fit(Toy(tmp_path, steps=3, save_every=100), Noting())
    assert {step for step, _ in marked} == {0, 1, 2}
    assert all(found == (step == 0) for step, found in marked)


def test_the_newest_are_kept_with_their_digests_and_nothing_else(tmp_path: Path) -> None:
    toy = Toy(tmp_path, steps=17)
    fit(toy)
    assert saved_steps(toy) == [15, 17]
    for path in checkpoints(tmp_path / CHECKPOINTS):
        verify(path)
    assert len(list((tmp_path / CHECKPOINTS).iterdir())) == 4


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")
@pytest.mark.parametrize("background", [True, False])
def test_chosen_steps_are_saved_and_kept_also_over_a_resume(background: bool, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"keep_steps": (3, 5, 9, 16), "background": background}
    toy = Toy(tmp_path, steps=12, **chosen)
    fit(toy)
    assert saved_steps(toy) == [3, 5, 9, 10, 12]
    for path in checkpoints(tmp_path / CHECKPOINTS):
        verify(path)
    for step in (9, 10, 12):  # as after damage: the run goes on from step 5, and makes step 9 again
        digest_of(checkpoint_path(tmp_path / CHECKPOINTS, step)).write_text("0" * 64)
    fit(Toy(tmp_path, steps=8, **chosen), resume=find_resumable(tmp_path / CHECKPOINTS))
    assert saved_steps(toy) == [3, 5, 8]
    fit(Toy(tmp_path, steps=17, **chosen), resume=find_resumable(tmp_path / CHECKPOINTS))
    assert saved_steps(toy) == [3, 5, 9, 16, 17]


def test_a_chosen_step_that_could_not_be_saved_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(path: Path, *_: Any) -> None:
        if step_of(path) == 3:
            raise CorruptCheckpointError("bad sectors")
        verify(path)

    monkeypatch.setattr(callbacks.checkpoints, "verify", damaged)
    fit(Toy(tmp_path, steps=6, keep_steps=(3,)))
    assert "training continues; step 3, which was to be kept, has no checkpoint" in capsys.readouterr().err
    with pytest.raises(ValueError, match="keep_steps=0: expected at least 1"):
        RunCheckpoints(tmp_path, 5, keep_steps=[4, 0])


def test_a_start_removes_the_files_of_a_killed_save(tmp_path: Path) -> None:
    folder = tmp_path / CHECKPOINTS
    folder.mkdir()
    # Of a step that this run does not save, so that no save of its own replaces them.
    for suffix in (".tmp", ".sha256", ".sha256.tmp"):
        (folder / f"step-00000003.ckpt{suffix}").touch()
    toy = Toy(tmp_path, steps=5)
    fit(toy)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000005.ckpt", "step-00000005.ckpt.sha256"]


# Lightning sees no state in the loader: it lies in the data module.
@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")
def test_resuming_from_an_older_checkpoint_leaves_no_later_ones_to_be_taken_for_newer(tmp_path: Path) -> None:
    toy = Toy(tmp_path, steps=10)
    fit(toy)
    digest_of(checkpoint_path(tmp_path / CHECKPOINTS, 10)).write_text("0" * 64)
    older = find_resumable(tmp_path / CHECKPOINTS)
    assert older == checkpoint_path(tmp_path / CHECKPOINTS, 5)
    fit(Toy(tmp_path, steps=8, save_every=2), resume=older)
    assert saved_steps(toy) == [6, 8]


def test_an_old_checkpoint_stays_while_the_new_one_cannot_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged_until_15(path: Path, *_: Any) -> None:
        if step_of(path) in (10, 15):
            raise CorruptCheckpointError("bad sectors")
        verify(path)

    toy = Toy(tmp_path, steps=17)
    monkeypatch.setattr(callbacks.checkpoints, "verify", damaged_until_15)
    fit(toy)
    assert EventLog(tmp_path / EVENTS).counts() == {"save-failed": 2}
    assert "cannot be read back: bad sectors; training continues" in capsys.readouterr().err
    assert 17 in saved_steps(toy)


def test_the_last_save_must_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: Path, *_: Any) -> None:
        raise CorruptCheckpointError("bad sectors")

    monkeypatch.setattr(callbacks.checkpoints, "verify", damaged)
    with pytest.raises(OSError, match="cannot be read back: bad sectors"):
        fit(Toy(tmp_path, steps=3))


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")
def test_a_checkpoint_that_cannot_be_deleted_is_told_once_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unlink = Path.unlink

    def busy(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".ckpt" and path.exists():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", busy)
    fit(Toy(tmp_path, steps=17))
    assert saved_steps(Toy(tmp_path)) == [5, 10, 15, 17]
    assert EventLog(tmp_path / EVENTS).counts() == {"delete-failed": 2}
    assert capsys.readouterr().err.count("step-00000005.ckpt cannot be deleted (Device or resource busy)") == 1
    for path in checkpoints(tmp_path / CHECKPOINTS):
        verify(path)


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")
def test_nothing_old_is_removed_before_a_new_checkpoint_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(Toy(tmp_path, steps=10))
    folder, metrics = tmp_path / CHECKPOINTS, tmp_path / METRICS
    damaged, copied = checkpoint_path(folder, 10), checkpoint_path(folder, 12)
    shutil.copyfile(damaged, copied)  # without its digest
    digest_of(damaged).write_text("0" * 64)
    (folder / "step-00000003.ckpt.sha256").write_text("of a file that is elsewhere")
    before, lines_before = {path.name for path in folder.iterdir()}, metrics.read_bytes()

    def never(path: Path, *_: Any) -> str:
        raise CorruptCheckpointError("bad sectors")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.checkpoints, "verify", never)
        with pytest.raises(OSError, match="bad sectors"):
            fit(Toy(tmp_path, steps=7, save_every=9), resume=checkpoint_path(folder, 5))
    assert before <= {path.name for path in folder.iterdir()}
    cut = (tmp_path / "metrics.replaced.jsonl").read_bytes()
    assert lines_before.endswith(cut)
    assert metrics.read_bytes().startswith(lines_before.removesuffix(cut))
    for path in checkpoints(folder):  # of the save that could not be verified
        if step_of(path) == 7:
            DurableCheckpointIO().remove_checkpoint(path)
    fit(Toy(tmp_path, steps=8, save_every=9), resume=checkpoint_path(folder, 5))
    assert saved_steps(Toy(tmp_path)) == [5, 8, 12], "a checkpoint without a digest was put there by somebody else"
    assert not (tmp_path / "metrics.replaced.jsonl").exists()
    assert not (folder / "step-00000003.ckpt.sha256").exists()


class Unreadable(Callback):
    """Adds an object to the checkpoint that cannot be read back."""

    def state_dict(self) -> dict[str, Any]:
        return {"where": Path("x")}


def test_a_state_that_cannot_be_read_back_stops_the_run_at_its_first_save(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    with pytest.raises(TypeError, match="weights_only=True"):
        fit(toy, Unreadable())
    assert saved_steps(toy) == []


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")
def test_metrics_that_end_before_the_checkpoint_are_logged(tmp_path: Path) -> None:
    fit(Toy(tmp_path, steps=7))
    before, path = lines(tmp_path), tmp_path / METRICS
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    fit(Toy(tmp_path, steps=7), resume=checkpoint_path(tmp_path / CHECKPOINTS, 5))
    assert EventLog(tmp_path / EVENTS).counts() == {"metrics-changed": 1}
    assert lines(tmp_path) == [*before[:3], *(line for line in before if line["step"] > 5)]


@pytest.mark.parametrize("harm", [{}, {"raise_at": 1}], ids=["after the end", "after an error"])
def test_signal_handlers_are_restored(tmp_path: Path, harm: dict[str, Any]) -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    with pytest.raises(ArithmeticError) if harm else nullcontext():
        fit(Toy(tmp_path, steps=2, harm=harm))
    assert [signal.getsignal(number) for number in HANDLED] == before


class SignalAfterTraining(Callback):
    """Sends this process a signal in the validation after the fit."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_in_the_validation_after_training_stops_with_its_code(number: int, tmp_path: Path) -> None:
    toy = Toy(tmp_path, steps=3)
    before = [signal.getsignal(one) for one in HANDLED]
    trainer = fit(toy, SignalAfterTraining(number))
    files = {file.name: file.stat().st_mtime_ns for file in checkpoints(tmp_path / CHECKPOINTS)}
    _, module, data = build(toy)
    with pytest.raises(Preempted) as stop:
        trainer.validate(module, data, verbose=False)
    assert (stop.value.exit_code, stop.value.step) == (128 + number, 3)
    assert {file.name: file.stat().st_mtime_ns for file in checkpoints(tmp_path / CHECKPOINTS)} == files
    assert [signal.getsignal(one) for one in HANDLED] == before


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*")
def test_a_run_that_resumes_after_its_last_step_knows_that_it_is_saved(tmp_path: Path) -> None:
    toy = Toy(tmp_path, steps=3)
    fit(toy)
    trainer = fit(toy, resume=checkpoint_path(tmp_path / CHECKPOINTS, 3))
    (saver,) = [one for one in trainer.callbacks if isinstance(one, RunCheckpoints)]  # type: ignore[attr-defined]
    assert saver.saved_step == 3


def test_a_copy_beside_the_checkpoints_is_none_of_them(tmp_path: Path) -> None:
    toy = Toy(tmp_path, steps=3)
    fit(toy)
    copy = tmp_path / CHECKPOINTS / "step-00000003-backup.ckpt"
    shutil.copyfile(checkpoint_path(tmp_path / CHECKPOINTS, 3), copy)
    assert saved_steps(toy) == [3]
    fit(Toy(tmp_path, steps=8))
    assert saved_steps(toy) == [5, 8]
    assert copy.exists()


@pytest.mark.parametrize("name", ["every_n_steps", "keep"])
def test_a_number_out_of_range_is_refused_by_name(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"every_n_steps": 1, "keep": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name}=0: expected at least 1"):
        RunCheckpoints(tmp_path, **options)


def test_the_agreements_of_ranks_have_the_given_time_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside NCCL's group they have one of the host, whose own time-out would be torch's."""
    made: list[dict[str, Any]] = []
    for module in (callbacks.checkpoints, callbacks.preemption):
        monkeypatch.setattr(module, "distributed", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda **options: made.append(options))
    timeout = timedelta(hours=2)
    trainer: Any = SimpleNamespace(
        global_step=0,
        is_global_zero=False,
        strategy=SimpleNamespace(broadcast=lambda folder: folder),
        fit_loop=SimpleNamespace(epoch_loop=None),
        _signal_connector=SimpleNamespace(),
    )
    saver = RunCheckpoints(tmp_path, 5, timeout=timeout)
    saver.on_train_start(trainer, pl.LightningModule())
    preemption = Preemption(saver, timeout)
    preemption.setup(trainer, pl.LightningModule(), "fit")
    trainer._signal_connector.teardown()
    assert made == [{"backend": "gloo", "timeout": timeout}] * 2


def test_ranks_of_a_new_run_draw_other_numbers_in_training() -> None:
    """Equal until then, so that they build equal models; equal masks of dropout would be one mask for all."""
    drawn = []
    for rank in range(3):
        torch.manual_seed(0)
        trainer: Any = SimpleNamespace(global_rank=rank, world_size=3, global_step=0)
        RngState(0).on_train_start(trainer, pl.LightningModule())
        drawn.append(float(torch.rand(())))
    torch.manual_seed(0)
    assert drawn[0] == float(torch.rand(()))
    assert len(set(drawn)) == 3

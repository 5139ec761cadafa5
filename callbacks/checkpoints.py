"""Checkpoint schedule and retention, and the checkpoint to resume from."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from callbacks.base.interval_sums import distributed
from callbacks.files.checkpoint_io import (
    SUFFIX,
    CorruptCheckpointError,
    DurableCheckpointIO,
    digest_of,
    leftovers,
    verify,
)
from callbacks.files.event_log import EventLog
from callbacks.files.metrics_file import MetricsFile

NOT_STARTED = "not-started"


class RunCheckpoints(Checkpoint):
    """Saves every `every_n_steps` optimizer steps, at the end and after an error; keeps the newest `keep`.

    A step's checkpoint is saved when the next batch starts: only then are that step's validation and its lines in
    metrics.jsonl complete, so that a resumed run neither repeats nor misses any. A checkpoint saved inside a validation
    records that, and the resumed run restarts the validation.

    A scheduled save that fails (full disk) is logged and retried at the next interval; one at the end or before a
    stop raises. Nothing that an earlier session wrote is deleted before a new checkpoint has been verified; what cannot
    be deleted is logged and stays. A checkpoint without a digest was put there by somebody else, and stays too.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int,
        keep: int = 2,
        metrics: MetricsFile | None = None,
        events: EventLog | None = None,
    ) -> None:
        """`metrics` is truncated on resume to its size at the checkpoint.

        Raises:
            ValueError: if `every_n_steps` or `keep` is less than 1.
        """
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        self.folder, self.every_n_steps, self.keep = folder, every_n_steps, keep
        self.metrics, self.events = metrics, events
        self._saved_step = 0  # nothing to save before the first step
        self._in_validation = False
        # Between two optimizer steps; inside one, parameters and counters are inconsistent.
        self._consistent = False
        self._metrics_end: tuple[int, str] = (0, "")  # size and last digest after the last step, before its validation
        self._resume_size: int | None = None
        self._undeletable: set[Path] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets aside lines written after the checkpoint, until the next checkpoint."""
        self._saved_step, self._consistent = trainer.global_step, True
        if trainer.is_global_zero:
            if self.metrics and self._resume_size is not None and not self.metrics.cut_to(self._resume_size):
                removed = self.metrics.cut_after(trainer.global_step)
                text = f"{self.metrics.path.name} changed since the checkpoint; {removed} lines of later steps removed"
                self._log("metrics-changed", text)
            self._metrics_end = self.metrics.end() if self.metrics else (0, "")
        self._resume_size = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (
            trainer.global_step
            and batch_idx % trainer.accumulate_grad_batches == 0
            and trainer.global_step % self.every_n_steps == 0
        ):
            self.save(trainer, required=False)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._consistent = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._consistent = True
        if self.metrics and trainer.is_global_zero:
            self._metrics_end = self.metrics.end()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)
        if trainer.is_global_zero:  # also where the last checkpoint is the one that this session started from
            self._remove_old(trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._consistent and not distributed():  # other ranks would have to take part
            self.save(trainer, required=False)
        self._consistent = False

    def save(self, trainer: pl.Trainer, required: bool = True) -> None:
        """Saves the current step once, then deletes checkpoints beyond `keep`; every rank must call it.

        Before the first step there is nothing to save, which a file in the folder records.

        Raises:
            OSError: on every rank, if `required` and the checkpoint could not be written.
            TypeError: on every rank, if it holds an object that `weights_only=True` refuses.
        """
        step = trainer.global_step
        if step == self._saved_step:
            if step == 0 and trainer.is_global_zero:
                mark_not_started(self.folder)
            return
        self._in_validation = trainer.validating
        path = checkpoint_path(self.folder, step)
        failure = trainer.strategy.broadcast(self._write(trainer, path))
        if failure is None:
            self._saved_step = step
            if trainer.is_global_zero:
                self._remove_old(step)
        elif required or not isinstance(failure, OSError):
            self._consistent = False  # so that `on_exception` does not try again
            raise failure
        elif trainer.is_global_zero:
            self._log("save-failed", f"{failure}; training continues")

    def state_dict(self) -> dict[str, Any]:
        now = self.metrics.end() if self.metrics else (0, "")
        size, digest = self._metrics_end if self._in_validation else now
        return {
            "in_validation": self._in_validation,
            "metrics_size": size,
            "metrics_digest": digest,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume_size = int(state_dict["metrics_size"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.metrics and trainer.is_global_zero:
            self.metrics.sync()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        in_validation = checkpoint["callbacks"].get(self.state_key, {}).get("in_validation", False)
        whole_steps(trainer, checkpoint["loops"]["fit_loop"], checkpoint["global_step"], in_validation)

    def _write(self, trainer: pl.Trainer, path: Path) -> Exception | None:
        """Saves and verifies; returns the error, if any (on rank 0 only)."""
        try:
            trainer.save_checkpoint(path)
        except (OSError, TypeError) as error:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # the other ranks wait there
            return error
        if trainer.is_global_zero:
            try:
                verify(path)
            except (CorruptCheckpointError, OSError) as error:
                return OSError(f"the checkpoint just written cannot be read back: {error}")
        return None

    def _remove_old(self, step: int) -> None:
        """Deletes what the checkpoint of `step` makes superfluous.

        All but the newest `keep` checkpoints, later ones from before a resume, files of killed saves, and lines that
        were set aside.
        """
        complete = [path for path in checkpoints(self.folder) if digest_of(path).is_file()]
        newest = [path for path in complete if step_of(path) <= step][-self.keep :]
        for path in complete:
            if path not in newest:
                self._remove(path, DurableCheckpointIO().remove_checkpoint)
        others = [*leftovers(self.folder), self.folder / NOT_STARTED]
        for path in [*others, self.metrics.replaced] if self.metrics else others:
            self._remove(path, Path.unlink)

    def _remove(self, path: Path, remove: Callable[[Path], None]) -> None:
        try:
            remove(path)
        except FileNotFoundError:
            pass
        except OSError as error:  # not permitted, or busy on a network file system
            if path not in self._undeletable:
                self._undeletable.add(path)
                self._log("delete-failed", f"{path} cannot be deleted ({error.strerror}); training continues")

    def _log(self, kind: str, text: str) -> None:
        print(f"{kind}: {text}", file=sys.stderr, flush=True)
        if self.events:
            self.events.write(kind, text)


def whole_steps(trainer: pl.Trainer, loops: dict[str, Any], steps: int, in_validation: bool) -> None:
    """Rewrites a fit loop's saved counters as those after `steps` complete optimizer steps.

    Lightning counts a batch when it is fetched and on resume resets only half of its counters, which shifts every later
    validation by a batch. The whole run is one Lightning epoch here: the sampler continues from `steps`, and so do the
    counters. The names are those of Lightning 2.6's `_FitLoop.state_dict`.
    """
    batches = steps * trainer.accumulate_grad_batches
    epoch, batch, validation = (
        loops[name] for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
    )
    for span in ("total", "current"):
        epoch[span] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        batch[span] |= dict.fromkeys(("ready", "started", "processed", "completed"), batches)
        # One batch started and none done makes Lightning restart the validation.
        begun = int(in_validation)
        validation[span] |= {"ready": begun, "started": begun, "processed": 0, "completed": 0}
    batch["is_last_batch"] = validation["is_last_batch"] = False
    interval = trainer.val_check_interval
    validated = isinstance(interval, int) and batches % interval == 0
    # Lightning counts the step again after the validation, which it runs or skips first.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - int(validated)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of a step's checkpoint."""
    return folder / f"step-{step:08d}{SUFFIX}"


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step-").removesuffix(SUFFIX))


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files of a run, oldest first."""
    return sorted(folder.glob(f"step-*{SUFFIX}"), key=step_of)


def mark_not_started(folder: Path) -> None:
    """Records that a run was stopped before its first step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NOT_STARTED).touch()


def was_not_started(folder: Path) -> bool:
    """Whether a run was stopped before its first step, so that it can begin again without a loss."""
    return (folder / NOT_STARTED).is_file() and not checkpoints(folder)


def require_same_metrics(metrics: MetricsFile, state: dict[str, Any]) -> None:
    """Checks the lines of metrics.jsonl up to a checkpoint with the state of its `RunCheckpoints`.

    A file that ends before is left to `RunCheckpoints`, which says that lines are missing and goes on.

    Raises:
        ValueError: if a line was changed, removed, doubled or moved.
    """
    size, digest = state.get("metrics_size", 0), state.get("metrics_digest")
    found = metrics.tip(size)
    if digest is not None and metrics.size() >= size and found != digest:
        raise ValueError(f"{metrics.path} has other lines than when its run's last checkpoint was saved")


def find_resumable(folder: Path, log: Callable[[str, str], None] | None = None) -> Path | None:
    """The newest intact checkpoint, or None; `log` receives an event (kind, text) per damaged one."""
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except (CorruptCheckpointError, OSError) as error:
            if log:
                log("corrupt-checkpoint", f"{error}; falling back to the previous one")
        else:
            return path
    return None

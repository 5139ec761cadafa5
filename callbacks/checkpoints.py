"""Checkpoint schedule and retention, and the checkpoint to resume from."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from callbacks.base.interval_sums import distributed
from callbacks.files.checkpoint_io import SUFFIX, CorruptCheckpointError, DurableCheckpointIO, digest_of, sweep, verify
from callbacks.files.event_log import EventLog
from callbacks.files.metrics_file import MetricsFile


class RunCheckpoints(Checkpoint):
    """Saves every `every_n_steps` optimizer steps, at the end and after an error; keeps the newest `keep`.

    A step's checkpoint is saved when the next batch starts: only then are that step's validation and its lines in
    metrics.jsonl complete, so that a resumed run neither repeats nor misses any. A checkpoint saved inside a validation
    records that, and the resumed run restarts the validation.

    A scheduled save that fails (full disk) is logged and retried at the next interval; one at the end or before a
    stop raises. An older checkpoint is deleted only after the new one has been verified.
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
        self._metrics_size = 0  # after the last step, before its validation
        self._resume_size: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes files of killed saves, and lines written after the checkpoint."""
        self._saved_step, self._consistent = trainer.global_step, True
        if trainer.is_global_zero:
            if self.folder.is_dir():
                sweep(self.folder)
            if self.metrics and self._resume_size is not None and not self.metrics.cut_to(self._resume_size):
                removed = self.metrics.cut_after(trainer.global_step)
                text = f"{self.metrics.path.name} changed since the checkpoint; {removed} lines of later steps removed"
                self._log("metrics-changed", text)
            self._metrics_size = self.metrics.size() if self.metrics else 0
        self._resume_size = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0 and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer, required=False)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._consistent = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._consistent = True
        if self.metrics and trainer.is_global_zero:
            self._metrics_size = self.metrics.size()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._consistent and not distributed():  # other ranks would have to take part
            self.save(trainer, required=False)
        self._consistent = False

    def save(self, trainer: pl.Trainer, required: bool = True) -> None:
        """Saves the current step once, then deletes checkpoints beyond `keep`; every rank must call it.

        Raises:
            OSError: on every rank, if `required` and the checkpoint could not be written.
            TypeError: on every rank, if it holds an object that `weights_only=True` refuses.
        """
        step = trainer.global_step
        if step == self._saved_step:
            return
        self._in_validation = trainer.validating
        path = checkpoint_path(self.folder, step)
        failure = trainer.strategy.broadcast(self._write(trainer, path))
        if failure is None:
            self._saved_step = step
            if trainer.is_global_zero:
                self._retain(step)
        elif required or not isinstance(failure, OSError):
            self._consistent = False  # so that `on_exception` does not try again
            raise failure
        elif trainer.is_global_zero:
            self._log("save-failed", f"{failure}; training continues")

    def state_dict(self) -> dict[str, Any]:
        size = self.metrics.size() if self.metrics else 0
        return {
            "in_validation": self._in_validation,
            "metrics_size": self._metrics_size if self._in_validation else size,
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

    def _retain(self, step: int) -> None:
        """Deletes all but the newest `keep`, and later ones from before a resume."""
        complete = [path for path in checkpoints(self.folder) if digest_of(path).is_file()]
        newest = [path for path in complete if step_of(path) <= step][-self.keep :]
        for path in checkpoints(self.folder):
            if path not in newest:
                DurableCheckpointIO().remove_checkpoint(path)

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


def find_resumable(folder: Path, log: Callable[[str, str], None] | None = None) -> Path | None:
    """The newest intact checkpoint, or None; `log` receives an event (kind, text) per damaged one."""
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except CorruptCheckpointError as error:
            if log:
                log("corrupt-checkpoint", f"{error}; falling back to the previous one")
        else:
            return path
    return None

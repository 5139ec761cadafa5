"""When checkpoints are saved, which are kept, and which one a run resumes from."""

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

    A step's checkpoint is saved when the next batch starts: only then are that step's validation and its
    lines in metrics.jsonl complete, so a resumed run repeats neither and misses neither. A checkpoint that has to
    be saved inside a validation says so, and the resumed run starts that validation again.

    A save on schedule that fails (full disk) is told and tried again at the next interval; one at the end or
    before a stop raises. An older checkpoint is deleted only when the new one has been read back.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int,
        keep: int = 2,
        metrics: MetricsFile | None = None,
        events: EventLog | None = None,
    ) -> None:
        """`metrics` is cut back on resume to what it was at the checkpoint.

        Raises:
            ValueError: if `every_n_steps` or `keep` is less than 1.
        """
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        self.folder, self.every_n_steps, self.keep = folder, every_n_steps, keep
        self.metrics, self.events = metrics, events
        self._saved_step = 0  # there is nothing to save before the first step
        self._in_validation = False
        # Between two optimizer steps; inside one, parameters and counters do not belong together.
        self._whole = False
        self._metrics_size = 0  # after the last step, before its validation
        self._resume_size: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes what a killed save left behind, and lines written after the checkpoint."""
        self._saved_step, self._whole = trainer.global_step, True
        if trainer.is_global_zero:
            if self.folder.is_dir():
                sweep(self.folder)
            if self.metrics and self._resume_size is not None and not self.metrics.cut_to(self._resume_size):
                gone = self.metrics.cut_after(trainer.global_step)
                text = f"{self.metrics.path.name} is not what the checkpoint knew; {gone} later lines dropped by step"
                self._tell("metrics-changed", text)
            self._metrics_size = self.metrics.size() if self.metrics else 0
        self._resume_size = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves the step before this batch, if it is due."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer, required=False)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Parameters are about to change."""
        self._whole = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """All callbacks have seen the step: this one comes last."""
        self._whole = True
        if self.metrics and trainer.is_global_zero:
            self._metrics_size = self.metrics.size()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last step."""
        self.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Saves the last whole step, if the other ranks need not take part."""
        if self._whole and not distributed():
            self.save(trainer, required=False)
        self._whole = False

    def save(self, trainer: pl.Trainer, required: bool = True) -> None:
        """Saves the current step once, then deletes checkpoints beyond `keep`; every rank must call it.

        Raises:
            OSError: on every rank, if `required` and the checkpoint could not be written.
            TypeError: on every rank, if it holds what could not be read back.
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
            self._whole = False  # so that `on_exception` does not try again
            raise failure
        elif trainer.is_global_zero:
            self._tell("save-failed", f"{failure}; training goes on")

    def state_dict(self) -> dict[str, Any]:
        """Whether the step still has to be validated, and how long metrics.jsonl is."""
        size = self.metrics.size() if self.metrics else 0
        return {
            "in_validation": self._in_validation,
            "metrics_size": self._metrics_size if self._in_validation else size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Notes where metrics.jsonl is cut when training starts."""
        self._resume_size = int(state_dict["metrics_size"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Makes the lines durable that came before this checkpoint."""
        if self.metrics and trainer.is_global_zero:
            self.metrics.sync()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Sets Lightning's counters to those of a whole step, wherever it was saved."""
        in_validation = checkpoint["callbacks"].get(self.state_key, {}).get("in_validation", False)
        whole_steps(trainer, checkpoint["loops"]["fit_loop"], checkpoint["global_step"], in_validation)

    def _write(self, trainer: pl.Trainer, path: Path) -> Exception | None:
        """Saves and reads back; what went wrong, if anything (known on rank 0 alone)."""
        try:
            trainer.save_checkpoint(path)
        except (OSError, TypeError) as error:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
            return error
        if trainer.is_global_zero:
            try:
                verify(path)
            except (CorruptCheckpointError, OSError) as error:
                return OSError(f"the checkpoint just written cannot be read back: {error}")
        return None

    def _retain(self, step: int) -> None:
        """Deletes all but the newest `keep`, and any of a future that this run has left by resuming."""
        complete = [path for path in checkpoints(self.folder) if digest_of(path).is_file()]
        kept = [path for path in complete if step_of(path) <= step][-self.keep :]
        for path in checkpoints(self.folder):
            if path not in kept:
                DurableCheckpointIO().remove_checkpoint(path)

    def _tell(self, kind: str, text: str) -> None:
        print(f"{kind}: {text}", file=sys.stderr, flush=True)
        if self.events:
            self.events.write(kind, text)


def whole_steps(trainer: pl.Trainer, loops: dict[str, Any], steps: int, in_validation: bool) -> None:
    """Rewrites a fit loop's saved counters as those after `steps` whole optimizer steps.

    Lightning counts a batch from the moment it is drawn and on resume resets only half of its counters, which
    shifts every later validation by a batch. One Lightning epoch is the whole run here: the sampler goes on from
    `steps`, and so do the counters. The names are those of Lightning 2.6's `_FitLoop.state_dict`.
    """
    batches = steps * trainer.accumulate_grad_batches
    epoch, batch, validation = (
        loops[name] for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
    )
    for span in ("total", "current"):
        epoch[span] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        batch[span] |= dict.fromkeys(("ready", "started", "processed", "completed"), batches)
        # One batch started and none done makes Lightning run the validation again, from its first batch.
        begun = int(in_validation)
        validation[span] |= {"ready": begun, "started": begun, "processed": 0, "completed": 0}
    batch["is_last_batch"] = validation["is_last_batch"] = False
    interval = trainer.val_check_interval
    validated = isinstance(interval, int) and batches % interval == 0
    # Lightning counts the step again after the validation that it runs or skips first.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - int(validated)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}{SUFFIX}"


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step-").removesuffix(SUFFIX))


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files of a run, oldest first."""
    return sorted(folder.glob(f"step-*{SUFFIX}"), key=step_of)


def find_resumable(folder: Path, tell: Callable[[str, str], None] | None = None) -> Path | None:
    """The newest checkpoint that is whole, or None; `tell` hears of damaged ones, a kind of event and its text."""
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except CorruptCheckpointError as error:
            if tell:
                tell("corrupt-checkpoint", f"{error}; falling back to the one before")
        else:
            return path
    return None

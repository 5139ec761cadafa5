"""When checkpoints are saved, which are kept, and which one a run resumes from."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from callbacks.checkpoint_io import SUFFIX, CorruptCheckpointError, DurableCheckpointIO, verify
from callbacks.events import EventLog


class RunCheckpoints(Checkpoint):
    """Saves every `every_n_steps` optimiser steps and at the end; keeps the newest `keep`.

    A step's checkpoint is saved when the next batch starts: only then are that step's validation and its
    lines in metrics.jsonl complete, so a resumed run repeats neither and misses neither.
    """

    def __init__(self, folder: Path, every_n_steps: int, keep: int = 2) -> None:
        self.folder, self.every_n_steps, self.keep = folder, every_n_steps, keep
        self._saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes what a killed save left behind; does not save the step that was resumed from."""
        self._saved_step = trainer.global_step
        if trainer.is_global_zero and self.folder.is_dir():
            for litter in self.folder.glob("*.tmp"):
                litter.unlink()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves the step before this batch, if it is due."""
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last step."""
        self.save(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes back the batch that was announced but not trained on when the checkpoint is saved.

        Lightning counts a batch as ready before `on_train_batch_start` and times validation by that count,
        so a resumed run would otherwise validate one step early.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in (progress["total"], progress["current"]):
            part["ready"] = part["started"] = part["completed"]

    def save(self, trainer: pl.Trainer) -> None:
        """Saves the current step once, then deletes checkpoints beyond `keep`."""
        step = trainer.global_step
        if step == self._saved_step:
            return
        path = self.folder / f"step-{step:08d}{SUFFIX}"
        trainer.save_checkpoint(path)
        self._saved_step = step
        if trainer.is_global_zero:
            verify(path)
            for old in checkpoints(self.folder)[: -self.keep]:
                DurableCheckpointIO().remove_checkpoint(old)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files of a run, oldest first."""
    return sorted(folder.glob(f"step-*{SUFFIX}"))


def find_resumable(folder: Path, events: EventLog | None = None) -> Path | None:
    """The newest checkpoint that is whole, or None; damaged ones are told in `events`."""
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
        except CorruptCheckpointError as error:
            if events:
                events.write("corrupt-checkpoint", f"{error}; falling back to the one before")
        else:
            return path
    return None

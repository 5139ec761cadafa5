"""Training progress with ETA on rank 0: a bar on a terminal, otherwise plain lines."""

import os
import sys
import time
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class HasLatest(Protocol):
    """A callback with scalars to show."""

    latest: dict[str, float]


class HasNote(Protocol):
    """A callback with a note on speed to show."""

    def note(self) -> str: ...


class RunProgress(Callback):
    """Shows optimizer steps, speed, the latest losses and ETA.

    Lightning's own bars must be off (`enable_progress_bar=False`). List it after `scalars`, so that a line shows
    the interval that just ended.
    """

    def __init__(self, scalars: HasLatest, every: int = 10, shown: int = 4, throughput: HasNote | None = None) -> None:
        """`every` is the number of steps between plain lines, `shown` the number of scalars per line.

        Raises:
            ValueError: if `every` is less than 1.
        """
        if every < 1:
            raise ValueError(f"every={every}: expected at least 1")
        self.scalars, self.every, self.shown, self.throughput = scalars, every, shown, throughput
        self._bar: Progress | None = None
        self._started = self._tokens = 0.0
        self._first_step = self._last_step = 0
        self._last_note = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started, self._tokens = time.monotonic(), 0.0
        self._first_step = self._last_step = trainer.global_step
        if trainer.is_global_zero and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._bar.add_task("train", total=trainer.max_steps, completed=trainer.global_step, note="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += outputs.get("tokens_nominal", outputs["samples"]) * trainer.world_size
        step = trainer.global_step
        if not trainer.is_global_zero or step == self._last_step:
            return
        self._last_step = step
        self._last_note = self._note(outputs)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, note=self._last_note)
        elif step % self.every == 0 or step == trainer.max_steps:
            elapsed = time.monotonic() - self._started
            left = elapsed / (step - self._first_step) * (trainer.max_steps - step)
            print(f"step {step}/{trainer.max_steps}  {self._last_note}  ETA {_clock(left)}", flush=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar:
            self._bar.update(self._bar.task_ids[0], note="validating")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar:
            self._bar.update(self._bar.task_ids[0], note=self._last_note)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _note(self, outputs: Any) -> str:
        speed = self._tokens / max(time.monotonic() - self._started, 1e-9)
        unit = "tokens" if "tokens_nominal" in outputs else "images"
        losses = "  ".join(f"{name} {value:.3f}" for name, value in list(self.scalars.latest.items())[: self.shown])
        note = self.throughput.note() if self.throughput else ""
        return "  ".join(part for part in (f"{speed:,.0f} {unit}/s", losses, note) if part)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

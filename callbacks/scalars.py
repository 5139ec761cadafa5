"""Scalars of a run without modalities (the image tokenizer)."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.base.contract import record_head
from callbacks.base.interval_sums import IntervalSums, to_double
from callbacks.files.metrics_file import MetricsFile


class RunScalars(Callback):
    """Writes the mean of each `outputs["metrics"]` over an interval, and `validation_summary(dataloader_idx)`.

    Means are weighted by samples. The device is synchronized once per interval.
    """

    def __init__(self, interval: int, metrics_path: Path, validations: Sequence[str] = ("val",)) -> None:
        """`interval` counts optimizer steps; `validations` are the names of the validation loaders, in their order.

        Raises:
            ValueError: if `interval` is out of range.
        """
        if interval < 1:
            raise ValueError(f"interval={interval}: expected at least 1")
        self.interval, self.file, self.validations = interval, MetricsFile(metrics_path), tuple(validations)
        self.samples = 0
        self.latest: dict[str, float] = {}
        self._names: list[str] = []
        self._sums = IntervalSums(0)
        self._last_step = 0
        self._rank, self._world = 0, 1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._rank, self._world = trainer.global_rank, trainer.world_size

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics, samples = outputs["metrics"], outputs["samples"]
        if not self._names:
            self._names = list(metrics)
            self._sums = IntervalSums(len(metrics) + 1)
        device = outputs["loss"].device
        values = [to_double(metrics[name], device) * samples for name in self._names]
        self._sums.add(torch.stack([*values, to_double(samples, device)]))
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        self._sums.end_step()
        if step % self.interval == 0:
            *totals, count = self._sums.take().tolist()
            self.samples += int(count)
            means = {name: total / count for name, total in zip(self._names, totals, strict=True)}
            self.latest = {name: mean for name, mean in means.items() if math.isfinite(mean)}
            self._write(trainer, {"train": self.latest}, self.samples)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the module's summary of every validation split; a complete sanity check is that of step 0."""
        summaries = {
            split: pl_module.validation_summary(number)  # type: ignore[operator]
            for number, split in enumerate(self.validations)
        }
        if trainer.sanity_checking and not math.isinf(trainer.num_sanity_val_steps):
            return
        # Before the first batch no rank knows the names, so none makes the collective call.
        more = int(self._sums.total()[-1]) if self._names else 0
        self._write(trainer, summaries, self.samples + more)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the partial interval of every rank; every rank must call it."""
        return {"samples": self.samples, "names": list(self._names), "interval_WS": self._sums.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples, self._names = int(state_dict["samples"]), list(state_dict["names"])
        self._sums = IntervalSums(state_dict["interval_WS"].shape[1])
        self._sums.load(state_dict["interval_WS"], self._rank, self._world)

    def _write(self, trainer: pl.Trainer, values: dict[str, dict[str, float]], samples: int) -> None:
        if not trainer.is_global_zero:
            return
        self.file.append({**record_head(trainer, {"samples": samples}), **values, "time": time.time()})
        scalars = {f"{key}/{name}": value for key, entries in values.items() for name, value in entries.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=samples)

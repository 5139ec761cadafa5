"""Scalars of a run that is not split by modality (the image tokenizer)."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.contract import record_head
from callbacks.metrics_file import MetricsFile


class RunScalars(Callback):
    """Writes the mean of each `outputs["metrics"]` over an interval, and `validation_summary()`."""

    def __init__(self, interval: int, metrics_path: Path) -> None:
        self.interval, self.file = interval, MetricsFile(metrics_path)
        self.samples = 0
        self.latest: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._last_step = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds a batch; writes at the end of an interval."""
        for name, value in outputs["metrics"].items():
            self._sums[name] = self._sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
        self._batches += 1
        self.samples += outputs["samples"] * trainer.world_size
        if trainer.global_step % self.interval == 0 and trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.latest = self._means()
            self._write(trainer, "train", self.latest)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the module's summary of the validation set."""
        summary = pl_module.validation_summary()  # type: ignore[operator]
        if not trainer.sanity_checking:
            self._write(trainer, "val", summary)

    def _means(self) -> dict[str, float]:
        names = list(self._sums)
        means = torch.stack([self._sums[name] / self._batches for name in names])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        self._sums, self._batches = {}, 0
        return dict(zip(names, means.tolist(), strict=True))

    def _write(self, trainer: pl.Trainer, key: str, values: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        self.file.append({**record_head(trainer, {"samples": self.samples}), key: values, "time": time.time()})
        for logger in trainer.loggers:
            logger.log_metrics({f"{key}/{name}": value for name, value in values.items()}, step=self.samples)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the partial interval of this rank."""
        return {
            "samples": self.samples,
            "sums": dict(self._sums),
            "batches": self._batches,
            "last_step": self._last_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the partial interval."""
        self.samples, self._sums = int(state_dict["samples"]), dict(state_dict["sums"])
        self._batches, self._last_step = int(state_dict["batches"]), int(state_dict["last_step"])

"""Speed, waiting for data, and memory, in the training lines of metrics.jsonl."""

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback


class Throughput(Callback):
    """Tokens a second over each logging interval, validations left out.

    On a GPU the host runs ahead of the device within an interval; its end waits for the device, so the sums of an
    interval are right where those of a step are not. A `data_wait` near 0 means that loading is fast enough.
    List it first, so that other callbacks' work counts as work and not as waiting.
    """

    def __init__(self) -> None:
        self._work = self._wait = 0.0  # seconds of the interval
        self._mark = 0.0
        self._validated = False  # since the last batch
        self._seen: dict[str, int] | None = None  # unknown where a resumed run begins
        self._device = torch.device("cpu")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._device = pl_module.device
        self._work = self._wait = 0.0
        self._mark, self._validated = time.perf_counter(), False
        self._seen = None if trainer.global_step else {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Waiting ends, work begins; the time of a validation counts as neither."""
        waited = self._lap()
        self._wait += 0.0 if self._validated else waited
        self._validated = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Work ends."""
        self._work += self._lap()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes that the time until the next batch is not waiting."""
        self._validated = True

    def record(self, seen: dict[str, int]) -> dict[str, Any]:
        """The interval's `throughput`.

        `samples_per_s`, `tokens_per_s` (positions) and `tokens_real_per_s` (pads excluded) are over all ranks;
        `data_wait` (share of the time) and `memory_mib` (peak) are this rank's. The first interval of a resumed
        run is in part another process's work and has no rates.
        """
        seconds, wait = self._work + self._wait, self._wait
        before, self._seen = self._seen, dict(seen)
        self._work = self._wait = 0.0
        fields: dict[str, float] = {}
        if before is not None and seconds > 0:
            for name, count in seen.items():
                fields[f"{name.removesuffix('_nominal')}_per_s"] = round((count - before.get(name, 0)) / seconds, 3)
            fields["data_wait"] = round(wait / seconds, 4)
        return {"throughput": {**fields, "memory_mib": self._memory()}}

    def _lap(self) -> float:
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        return passed

    def _memory(self) -> int:
        """Peak MiB: of the GPU where there is one, else of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) // 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // (2**20 if sys.platform == "darwin" else 2**10)

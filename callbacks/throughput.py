"""Speed, waiting for data, and memory, in the training lines of metrics.jsonl."""

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler, Profiler

# What Lightning calls the fetch of a training batch.
FETCH = ".train_dataloader_next"
# Share of the time from which waiting for data is worth a word.
WAITING = 0.02


class FetchClock(Profiler):
    """Seconds that training waits for its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = self._began = 0.0

    def start(self, action_name: str) -> None:
        """A fetch begins, where it is training's."""
        if action_name.endswith(FETCH):
            self._began = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """A fetch ends."""
        if action_name.endswith(FETCH):
            self.seconds += time.perf_counter() - self._began


class Throughput(Callback):
    """Tokens a second over each logging interval, validations and what follows them before the next batch left out.

    On a GPU the host runs ahead of the device within an interval; its end waits for the device, so the sums of an
    interval are right where those of a step are not. A `data_wait` near 0 means that loading is fast enough: it is the
    share of the time in which the next batch is fetched, by Lightning's own marks, so a Trainer with a profiler of
    its own has none.
    """

    def __init__(self, flop_per_token: float | None = None, peak: float | None = None) -> None:
        """`flop_per_token` are operations of a position in training, `peak` what a device does a second at most."""
        self.flop_per_token, self.peak = flop_per_token, peak
        self.clock = FetchClock()
        self._steps = self._steps_left = 0  # optimizer steps of the interval, and after it
        self._began = self._waited = 0.0  # when the interval began, and what had been waited for by then
        self._paused: tuple[float, float] | None = None  # both when a validation began, until the next batch
        self._seen: dict[str, int] | None = None  # unknown where a resumed run begins
        self._device, self._world, self._step = torch.device("cpu"), 1, 0
        self.latest: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Has fetches marked."""
        if isinstance(trainer.profiler, PassThroughProfiler):  # type: ignore[attr-defined]
            trainer.profiler = self.clock  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._device, self._world = pl_module.device, trainer.world_size
        self._step = trainer.global_step
        self._began, self._waited, self._paused = time.perf_counter(), self.clock.seconds, None
        self._seen = None if trainer.global_step else {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leaves out a validation and what came after it."""
        if self._paused is not None:
            began, waited = self._paused
            self._began += time.perf_counter() - began
            self._waited += self.clock.seconds - waited
            self._paused = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts optimizer steps."""
        self._steps += trainer.global_step - self._step
        self._step = trainer.global_step
        self._steps_left = trainer.max_steps - self._step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes when the pause began."""
        if not trainer.sanity_checking:
            self._paused = time.perf_counter(), self.clock.seconds

    def record(self, seen: dict[str, int]) -> dict[str, Any]:
        """The interval's `throughput`.

        `samples_per_s`, `tokens_per_s` (positions) and `tokens_real_per_s` (pads excluded) are over all ranks;
        `tflop_per_s` and `mfu` (their share of the peak) are of one device; `data_wait` (share of the time) and
        `memory_mib` (peak) are this rank's; `eta_s` is the time left at this speed, validations left out. The first
        interval of a resumed run is in part another process's work and has no rates.
        """
        now, waited = time.perf_counter(), self.clock.seconds
        seconds, wait = now - self._began, waited - self._waited
        self._began, self._waited = now, waited
        before, self._seen = self._seen, dict(seen)
        steps, self._steps = self._steps, 0
        fields: dict[str, float] = {}
        if before is not None and seconds > 0:
            for name, count in seen.items():
                fields[f"{name.removesuffix('_nominal')}_per_s"] = round((count - before.get(name, 0)) / seconds, 3)
            if self.flop_per_token is not None:
                done = fields["tokens_per_s"] * self.flop_per_token / self._world
                fields["tflop_per_s"] = float(f"{done / 1e12:.4g}")
                if self.peak is not None:
                    fields["mfu"] = round(done / self.peak, 4)
            fields["data_wait"] = round(wait / seconds, 4)
            fields["eta_s"] = round(seconds / max(1, steps) * self._steps_left, 3)
        self.latest = {**fields, "memory_mib": self._memory()}
        return {"throughput": self.latest}

    def note(self) -> str:
        """The latest interval for a line of progress: MFU where it is known, waiting where it matters, memory."""
        latest = self.latest
        parts = [f"{latest['mfu']:.1%} MFU"] if "mfu" in latest else []
        parts += [f"{latest['data_wait']:.0%} waiting for data"] if latest.get("data_wait", 0) >= WAITING else []
        parts += [f"{latest['memory_mib'] / 1024:.1f} GiB"] if latest else []
        return "  ".join(parts)

    def _memory(self) -> int:
        """Peak MiB: of the GPU where there is one, else of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) // 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // (2**20 if sys.platform == "darwin" else 2**10)

"""Speed, data wait, stalls by saves and memory in the training lines of metrics.jsonl."""

import resource
import sys
import time
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler, Profiler

from callbacks.base.periodic import MEASUREMENT
from callbacks.checkpoints import SAVE

# Lightning's name of the action that fetches a training batch.
FETCH = ".train_dataloader_next"
# Minimum share of time waiting for data to be shown in the progress.
WAITING = 0.02


class Reading(NamedTuple):
    """A time and the seconds waited for batches until then."""

    time: float
    waited: float

    def since(self, earlier: "Reading") -> "Reading":
        """The differences to an earlier one."""
        return Reading(self.time - earlier.time, self.waited - earlier.waited)


class WaitClock(Profiler):
    """Seconds that training waits for its batches, its checkpoints and measurements.

    Attributes:
        seconds: of all batches.
        measuring: of all measurements.
        stalls: of each save since `take_stalls`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = self.measuring = 0.0
        self.stalls: list[float] = []
        self._began: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        if action_name.endswith(FETCH) or action_name in (SAVE, MEASUREMENT):
            self._began[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name not in self._began:
            return
        seconds = time.perf_counter() - self._began.pop(action_name)
        if action_name == SAVE:
            self.stalls.append(seconds)
        elif action_name == MEASUREMENT:
            self.measuring += seconds
        else:
            self.seconds += seconds

    def now(self) -> Reading:
        """The time, without that of measurements, and the seconds waited for batches."""
        return Reading(time.perf_counter() - self.measuring, self.seconds)

    def take_stalls(self) -> list[float]:
        """The stalls so far, which are then forgotten."""
        stalls, self.stalls = self.stalls, []
        return stalls


class Throughput(Callback):
    """Tokens/s over each logging interval, excluding measurements, validations and what follows these before a batch.

    On a GPU the host runs ahead of the device within an interval, whose end synchronizes: times of intervals are
    correct, times of single steps are not. `data_wait` is the share of time spent fetching batches; near 0, loading is
    fast enough. `save_stall_s` is what a save held up training, in intervals with one. Both are measured as Lightning's
    profiler, so a Trainer with another profiler has none.
    """

    def __init__(self, flop_per_token: float | None = None, peak: float | None = None) -> None:
        """`flop_per_token` is training's operations per position, `peak` the device's operations per second."""
        self.flop_per_token, self.peak = flop_per_token, peak
        self.clock = WaitClock()
        self._steps = self._steps_left = 0  # optimizer steps of the interval, and after it
        self._began = Reading(0.0, 0.0)  # at the start of the interval
        self._paused: Reading | None = None  # at the start of a validation
        self._seen: dict[str, int] | None = None  # unknown at the start of a resumed run
        self._device, self._world, self._step = torch.device("cpu"), 1, 0
        self.latest: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.profiler, PassThroughProfiler):  # type: ignore[attr-defined]
            trainer.profiler = self.clock  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._device, self._world = pl_module.device, trainer.world_size
        self._step = trainer.global_step
        self._began, self._paused = self.clock.now(), None
        self._seen = None if trainer.global_step else {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._paused is not None:  # excludes the validation and what followed it
            pause = self.clock.now().since(self._paused)
            self._began = Reading(self._began.time + pause.time, self._began.waited + pause.waited)
            self._paused = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps += trainer.global_step - self._step
        self._step = trainer.global_step
        self._steps_left = trainer.max_steps - self._step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._paused = self.clock.now()

    def record(self, seen: dict[str, int]) -> dict[str, Any]:
        """The interval's `throughput`.

        `samples_per_s`, `tokens_per_s` (positions, pads included) and `tokens_real_per_s` (pads excluded) are totals of
        all ranks; `tflop_per_s` and `mfu` (its share of the peak) are per device, of all positions, also of pads that
        are not computed (`data.pad_to_multiple_of`, `trainer.packing`); `data_wait` (share of time) and `memory_mib`
        (peak) are this rank's; `eta_s` is the remaining time at this speed, without validations and measurements;
        `save_stall_s` is the mean over the interval's saves, which the rates include. The first interval of a resumed
        run has no rates: an earlier process did part of it.
        """
        now = self.clock.now()
        seconds, wait = now.since(self._began)
        self._began = now
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
        if stalls := self.clock.take_stalls():
            fields["save_stall_s"] = round(sum(stalls) / len(stalls), 4)
        self.latest = {**fields, "memory_mib": self._memory()}
        return {"throughput": self.latest}

    def note(self) -> str:
        """The latest interval for the progress line: MFU if known, data wait if notable, memory."""
        latest = self.latest
        parts = [f"{latest['mfu']:.1%} MFU"] if "mfu" in latest else []
        parts += [f"{latest['data_wait']:.0%} waiting for data"] if latest.get("data_wait", 0) >= WAITING else []
        parts += [f"{latest['memory_mib'] / 1024:.1f} GiB"] if latest else []
        return "  ".join(parts)

    def _memory(self) -> int:
        """Peak MiB of the GPU if there is one, else of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) // 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // (2**20 if sys.platform == "darwin" else 2**10)

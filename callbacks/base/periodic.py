"""Base class of callbacks that act at intervals of optimizer steps, and isolation of their side effects."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

# Name of a measurement for the trainer's profiler, whose time is no training.
MEASUREMENT = "Periodic.due"


class Periodic(Callback):
    """Calls `due` on every rank after each `interval` optimizer steps."""

    def __init__(self, interval: int) -> None:
        """`interval` counts optimizer steps.

        Raises:
            ValueError: if it is not positive.
        """
        if interval < 1:
            raise ValueError(f"interval={interval}: expected at least 1")
        self.interval = interval
        self._last_step = 0

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Acts at the end of an interval."""
        raise NotImplementedError

    def is_due(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether a step ends an interval."""
        return step % self.interval == 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step:  # a micro-batch without an optimizer step
            return
        self._last_step = step
        if self.is_due(trainer, step):
            self.measure_now(trainer, pl_module, step)

    def measure_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Calls `due`, as `MEASUREMENT` of the trainer's profiler."""
        with trainer.profiler.profile(MEASUREMENT):  # type: ignore[attr-defined]
            self.due(trainer, pl_module, step)


@contextmanager
def undisturbed(module: pl.LightningModule) -> Iterator[None]:
    """Evaluation mode without gradients; restores the mode of every submodule and the random generators on exit."""
    modes = {part: part.training for part in module.modules()}
    # Only the device in use: reading the state of all would initialize each of them.
    devices = [module.device] if module.device.type == "cuda" else []
    module.eval()
    try:
        with isolate_rng(include_cuda=False), torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training

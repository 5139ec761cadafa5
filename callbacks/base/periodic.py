"""What measures at intervals of a run: counted in optimizer steps, once each, without disturbing training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng


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
        """What happens at the end of an interval."""
        raise NotImplementedError

    def is_due(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether a step ends an interval."""
        return step % self.interval == 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts after the step that was resumed from."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts optimizer steps, not micro-batches."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if self.is_due(trainer, step):
            self.due(trainer, pl_module, step)


@contextmanager
def undisturbed(module: pl.LightningModule) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule's mode and the random streams are as before."""
    modes = {part: part.training for part in module.modules()}
    # Only the device in use: asking for the state of all would open each of them.
    devices = [module.device] if module.device.type == "cuda" else []
    module.eval()
    try:
        with isolate_rng(include_cuda=False), torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training

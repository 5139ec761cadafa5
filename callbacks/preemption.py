"""Ends a run cleanly on SIGTERM or Ctrl-C: save, then stop, on all ranks together."""

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoints import RunCheckpoints

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):  # noqa: N818 - an order carried out, not an error
    """The run was asked to stop, and saved itself. `exit_code` follows the shell's convention."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.exit_code = 128 + number


class Preemption(Callback):
    """Raises a flag on a signal, agrees on it over ranks before the next batch, saves and raises `Preempted`.

    The handler only sets the flag: a collective call inside a handler hangs when one rank alone is signalled.
    A second signal acts as it would without this callback.
    """

    def __init__(self, saver: RunCheckpoints) -> None:
        self.saver = saver
        self._received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Installs the handlers, after Lightning's own."""
        self._received = 0
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops between two batches if any rank was signalled.

        Raises:
            Preempted: after the checkpoint is saved.
        """
        received = self._received
        if dist.is_available() and dist.is_initialized():
            flag = torch.tensor(received, device=pl_module.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            received = int(flag)
        if received:
            self.saver.save(trainer)
            raise Preempted(received, trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        for name, handler in self._previous.items():
            signal.signal(name, handler if callable(handler) else signal.SIG_DFL)

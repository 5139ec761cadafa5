"""Ends a run cleanly on SIGTERM or Ctrl-C: save, then stop, on all ranks together."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from callbacks.base.interval_sums import distributed
from callbacks.checkpoints import RunCheckpoints

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds after the first signal in which another is taken for its echo from a launcher.
ECHO = 1.0


class Preempted(Exception):  # noqa: N818 - an order carried out, not an error
    """The run was asked to stop, and saved itself. `exit_code` follows the shell's convention: 143 or 130."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.exit_code = 128 + number


class Preemption(Callback):
    """Raises a flag on a signal, agrees on it over ranks before the next batch, saves and raises `Preempted`.

    The handler only sets the flag: a collective call inside a handler hangs when one rank alone is signalled.
    Ranks agree once an optimizer step and once a validation batch, over a group of their own on the host, so
    that the device need not be waited for. A second Ctrl-C ends the process at once; a second SIGTERM does
    nothing more, since torchrun passes on to its workers what Slurm has sent them already.

    List it before callbacks that work in `on_train_start`.
    """

    def __init__(self, saver: RunCheckpoints) -> None:
        self.saver = saver
        self._received = 0
        self._received_at = 0.0
        self._installed = False
        self._group: Any = None
        self._shared_batches = 0

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first validation can take long, too."""
        self._install(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Installs the handlers, over Lightning's own."""
        self._install(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops between two optimizer steps if any rank was signalled."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.stop_if_asked(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds how many validation batches all ranks have: only before those can they agree."""
        mine = sum(int(number) for number in trainer.num_val_batches if number != float("inf"))
        self._shared_batches = -self._highest(-mine)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stops inside a validation, which the resumed run repeats."""
        if self._installed and batch_idx < self._shared_batches and dataloader_idx == 0:
            self.stop_if_asked(trainer)

    def stop_if_asked(self, trainer: pl.Trainer) -> None:
        """Saves and stops if any rank was signalled; for long work in callbacks, where every rank must call it.

        Raises:
            Preempted: after the checkpoint is saved.
        """
        received = self._highest(self._received)
        if received:
            self.saver.save(trainer)
            raise Preempted(received, trainer.global_step)

    def asked(self) -> bool:
        """Whether any rank was signalled; for work that can be given up within a step. Every rank must call it."""
        return self._highest(self._received) > 0

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning is about to put back the handlers from before the run."""
        self._installed = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning has put back the handlers from before the run."""
        self._installed = False

    def _highest(self, value: int) -> int:
        """The highest value on any rank."""
        if not distributed():
            return value
        agreed = torch.tensor(value)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._group)
        return int(agreed)

    def _install(self, trainer: pl.Trainer) -> None:
        if self._installed:
            return
        if distributed() and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is not threading.main_thread():
            return  # Python takes signals in the main thread alone
        self._received = 0
        for number in SIGNALS:
            signal.signal(number, self._note)
        self._installed = True
        loop = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):
            # Lightning asks rank 0 before every batch whether its own handler, replaced here, has run, and waits
            # for the device to hear the answer.
            loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._received_at = number, time.monotonic()
            # Not print: the handler may have interrupted one.
            text = f"\n{signal.Signals(number).name}: saving after this step; Ctrl-C stops without\n"
            os.write(2, text.encode())
        elif number == signal.SIGINT and time.monotonic() - self._received_at > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _nothing() -> None:
    """In place of Lightning's question."""

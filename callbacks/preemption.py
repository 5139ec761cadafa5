"""Clean end of a run on SIGTERM, SIGUSR1 or Ctrl-C: all ranks save, then stop."""

import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.base.interval_sums import distributed, highest_of_ranks, host_group
from callbacks.checkpoints import RunCheckpoints

# Slurm's scripts ask for SIGUSR1 some time before the limit (`--signal=USR1@120`).
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Seconds after the first signal in which another counts as the launcher's copy of it.
ECHO = 1.0


class Preempted(Exception):  # noqa: N818 - not an error
    """The run has saved and stopped on a signal, or had nothing to save at step 0.

    Attributes:
        signal: its number.
        step: the last step.
        exit_code: by the shell's convention 128 plus the signal: 143, 138 or 130.
    """

    def __init__(self, number: int, step: int) -> None:
        when = f"after step {step}" if step else "before its first step"
        super().__init__(f"stopped by {signal.Signals(number).name} {when}")
        self.signal, self.step, self.exit_code = number, step, 128 + number


class Preemption(Callback):
    """Sets a flag on a signal, agrees on it over ranks before the next batch, saves and raises `Preempted`.

    The handler only sets the flag: a collective call in a handler would hang if only one rank is signalled. Ranks
    agree once per optimizer step and per validation batch, over a process group on the host, without synchronizing the
    device. A second Ctrl-C ends the process immediately; a second SIGTERM or SIGUSR1 has no effect, since torchrun
    forwards to its workers what Slurm already sent them.
    """

    def __init__(self, saver: RunCheckpoints, timeout: timedelta | None = None) -> None:
        """`timeout` is that of the agreement, in which a rank may wait for the work of another; None: torch's."""
        self.saver, self.timeout = saver, timeout
        self._received = 0
        self._received_at = 0.0
        self._handlers: dict[int, Any] = {}  # those of before, while this callback's are installed
        self._group: Any = None
        self._shared_batches: list[int] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Installs the handlers, and makes the ranks' group: also where a run resumes after its last step."""
        if self._group is None and distributed():
            self._group = host_group(self.timeout)
        self._install(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.stop_if_asked(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Ranks can agree only before batches that all of them have.
        mine = [0 if number == float("inf") else int(number) for number in trainer.num_val_batches]
        self._shared_batches = [-self._highest(-number) for number in mine]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.stop_if_asked(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # A resumed run repeats the validation.
        if batch_idx < self._shared_batches[dataloader_idx]:
            self.stop_if_asked(trainer)

    def stop_if_asked(self, trainer: pl.Trainer) -> None:
        """Saves and stops if any rank was signalled; also for long work in callbacks. Every rank must call it.

        Raises:
            Preempted: after saving the checkpoint.
        """
        received = self._highest(self._received)
        if received:
            if trainer.state.fn == TrainerFn.FITTING:  # else the last step is saved
                self.saver.save(trainer)
            raise Preempted(received, trainer.global_step)

    def asked(self) -> bool:
        """Whether any rank was signalled, for work that can be abandoned within a step. Every rank must call it."""
        return self._highest(self._received) > 0

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop_if_asked(trainer)  # by a signal during the last validation or save

    def _highest(self, value: int) -> int:
        """The highest value of all ranks."""
        return highest_of_ranks(value, self._group)

    def _install(self, trainer: pl.Trainer) -> None:
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return  # Python handles signals only in the main thread
        self._received = 0
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        # Lightning's handler of SIGTERM begins a collective call, in which ranks would wait that were not signalled,
        # and its loop broadcasts the request in every batch, which synchronizes the device.
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
        # After other callbacks have saved, also on an error.
        trainer._signal_connector.teardown = self._uninstall  # type: ignore[method-assign]
        loop = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):
            loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def _uninstall(self) -> None:
        for number, handler in self._handlers.items():
            if handler is not None:  # not one of another language's code
                signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._received_at = number, time.monotonic()
            # Not print, which the handler may have interrupted.
            text = f"\n{signal.Signals(number).name}: saving after this step; Ctrl-C stops without\n"
            os.write(2, text.encode())
        elif number == signal.SIGINT and time.monotonic() - self._received_at > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _nothing() -> None:
    """Takes the place of a method of Lightning."""

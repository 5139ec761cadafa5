"""Reports where the main thread of this rank is to a watch over all ranks."""

from collections.abc import Callable
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn


class Watch(Protocol):
    """What is reported to."""

    def enter(self, phase: str, step: int | None = None) -> None:
        """The next of the points that every rank passes in the same order."""
        ...

    def moved(self) -> None:
        """Progress within a phase."""
        ...


class RankProgress(Callback):
    """Enters a phase of the watch at each hook that every rank passes. List it first, and `BatchReading` last."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._first = True  # of this session: kernels are compiled and connections opened in it

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch.enter("validating", trainer.global_step)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.watch.moved()  # ranks have different numbers of batches

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch.enter("measuring", trainer.global_step)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch.enter("starting", trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._in_step(trainer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        self._in_step(trainer)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._in_step(trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._in_step(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._first = self._first and (batch_idx + 1) % trainer.accumulate_grad_batches > 0
        self.watch.enter("measuring", trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.watch.enter("saving", trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch.enter("measuring", trainer.global_step)

    def _in_step(self, trainer: pl.Trainer) -> None:
        self.watch.enter("first step" if self._first else "training", trainer.global_step + 1)


class BatchReading(Callback):
    """Enters the phase in which the next batch is read, once all other callbacks are done with a step.

    `is_remote` tells whether it is fetched over the network, whose retries may take long.
    """

    def __init__(self, watch: Watch, is_remote: Callable[[], bool] = lambda: False) -> None:
        self.watch, self.is_remote = watch, is_remote

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._enter(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._enter(trainer)

    def _enter(self, trainer: pl.Trainer) -> None:
        self.watch.enter("fetching" if self.is_remote() else "drawing", trainer.global_step + 1)

"""What a model has forgotten, measured before, during and after training (Table 1, and as curves)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.perplexity import EMASplitPerplexity


class Forgetting(Callback):
    """Measures on rank 0 while the others wait: before the first step, every `interval` steps, after the last.

    Writes a line with `forgetting`, what `measure` returned, to metrics.jsonl, and its numbers to TensorBoard. Whatever
    the measurement draws or switches, training goes on as if it had not been: random streams and the mode of every
    submodule are put back.
    """

    def __init__(
        self, interval: int, measure: Callable[[pl.LightningModule], dict[str, Any]], meter: EMASplitPerplexity
    ) -> None:
        """`measure` is given the module in evaluation mode and returns what JSON can hold; `meter` writes the line.

        Raises:
            ValueError: if `interval` is not positive.
        """
        if interval < 1:
            raise ValueError(f"interval={interval}: expected at least 1")
        self.interval, self.measure, self.meter = interval, measure, meter
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the model as it was, unless the run goes on from a later step."""
        self._last_step = trainer.global_step
        if trainer.global_step == 0:
            self._write(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures where an interval or the run ends."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if step % self.interval == 0 or step == trainer.max_steps:
            self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        head = self.meter.head(trainer)  # every rank must ask
        if not trainer.is_global_zero:
            return
        with undisturbed(pl_module):
            measured = self.measure(pl_module)
        if self.meter.file:
            self.meter.file.append({**head, "forgetting": measured})
        for logger in trainer.loggers:
            logger.log_metrics(numbers(measured, "forgetting"), step=head["tokens_nominal"])


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


def numbers(tree: dict[str, Any], prefix: str) -> dict[str, float]:
    """Every number of a tree of dicts by its path."""
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float):
            found[f"{prefix}/{key}"] = float(value)
    return found

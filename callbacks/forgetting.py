"""What a model has forgotten, measured before, during and after training (Table 1, and as curves)."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from callbacks.base.periodic import Periodic, undisturbed
from callbacks.perplexity import EMASplitPerplexity


class Forgetting(Periodic):
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
        super().__init__(interval)
        self.measure, self.meter = measure, meter

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the model as it was, unless the run goes on from a later step."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self.due(trainer, pl_module, 0)

    def is_due(self, trainer: pl.Trainer, step: int) -> bool:
        """Where an interval or the run ends."""
        return super().is_due(trainer, step) or step == trainer.max_steps

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Measures, and writes the line."""
        head = self.meter.head(trainer)  # every rank must ask
        if not trainer.is_global_zero:
            return
        with undisturbed(pl_module):
            measured = self.measure(pl_module)
        if self.meter.file:
            self.meter.file.append({**head, "forgetting": measured})
        for logger in trainer.loggers:
            logger.log_metrics(numbers(measured, "forgetting"), step=head["tokens_nominal"])


def numbers(tree: dict[str, Any], prefix: str) -> dict[str, float]:
    """Every number of a tree of dicts by its path."""
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float):
            found[f"{prefix}/{key}"] = float(value)
    return found

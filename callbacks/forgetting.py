"""Language retention measured before, during and after training (Table 1, and as curves)."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from callbacks.base.periodic import Periodic, undisturbed
from callbacks.perplexity import EMASplitPerplexity

# Numbers of a measurement that a chart shows; all are in metrics.jsonl.
CURVES = ("nll", "top1", "accuracy")
# Parts that are no curve, or another reading of the same answers.
LEFT_OUT = ("floors", "all_rows_norm", "text_rows_norm", "all_rows_nll", "text_rows_nll")


class Forgetting(Periodic):
    """Measures on rank 0 while the others wait: before the first step, every `interval` steps, after the last.

    Writes the result of `measure` as `forgetting` to metrics.jsonl, and its curves to TensorBoard. Training is
    unaffected: random generators and the mode of every submodule are restored.
    """

    def __init__(
        self, interval: int, measure: Callable[[pl.LightningModule], dict[str, Any]], meter: EMASplitPerplexity
    ) -> None:
        """`measure` receives the module in evaluation mode and returns JSON values; `meter` writes the line.

        Raises:
            ValueError: if `interval` is not positive.
        """
        super().__init__(interval)
        self.measure, self.meter = measure, meter

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:  # not resumed
            self.measure_now(trainer, pl_module, 0)

    def is_due(self, trainer: pl.Trainer, step: int) -> bool:
        return super().is_due(trainer, step) or step == trainer.max_steps

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        head = self.meter.head(trainer)  # a collective call
        if not trainer.is_global_zero:
            return
        with undisturbed(pl_module):
            measured = self.measure(pl_module)
        if self.meter.file:
            self.meter.file.append({**head, "forgetting": measured})
        for logger in trainer.loggers:
            logger.log_metrics(curves(measured, "forgetting"), step=head["tokens_nominal"])


def curves(tree: dict[str, Any], prefix: str) -> dict[str, float]:
    """The numbers named in `CURVES` in a tree of dicts, by path."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key not in LEFT_OUT:
            flat |= curves(value, f"{prefix}/{key}")
        elif key in CURVES:
            flat[f"{prefix}/{key}"] = float(value)
    return flat

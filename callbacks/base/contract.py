"""Interface between modules and callbacks, and the first fields of every line in metrics.jsonl.

M is the number of modalities of the module. A step returns sums, never means: sums over any micro-batches and ranks
can be added, then divided once.
"""

from typing import Any, Protocol, TypedDict

from torch import Tensor


class StepOutput(TypedDict, total=False):
    """Output of `training_step` and `validation_step`, per rank and micro-batch.

    `nll_sum` (M,) in nats and `count` (M,) follow the module's `modalities`; `tokens_real` is 0-d. Tensors are
    detached and on the device, so that a step needs no synchronization. Only `training_step` has a `loss`.
    """

    loss: Tensor
    nll_sum: Tensor
    count: Tensor
    samples: int
    tokens_nominal: int
    tokens_real: Tensor


class SplitLossModule(Protocol):
    """A module whose loss is split by modality.

    An optional method `scalars() -> dict[str, float]` gives more values to write with the training loss.
    `NonFiniteGuard` sets `gradient_norm` before each update to the total norm of the unclipped gradient.
    """

    modalities: tuple[str, ...]


class Extras(Protocol):
    """A callback that adds fields to the training lines of metrics.jsonl."""

    def record(self, seen: dict[str, int]) -> dict[str, Any]:
        """Fields for the interval that ends now; `seen` counts samples and tokens of the whole run."""
        ...


def record_head(trainer: Any, seen: dict[str, int]) -> dict[str, Any]:
    """The first fields of every line in metrics.jsonl: step, samples, tokens and learning rate."""
    optimizers = trainer.optimizers
    rate = float(optimizers[0].param_groups[0]["lr"]) if optimizers else 0.0
    return {"step": int(trainer.global_step), **seen, "lr": rate}

"""What the callbacks expect of a module's steps, and the head of every line they write.

M is the number of modalities of the module. A step returns sums, never means: sums can be added over
micro-batches and ranks in any cut and divided once.
"""

from typing import Any, Protocol, TypedDict

from torch import Tensor


class StepOutput(TypedDict, total=False):
    """What `training_step` and `validation_step` return, per rank and micro-batch.

    `nll_sum` (M,) in nats and `count` (M,) follow the module's `modalities`; `tokens_real` is 0-d. Tensors are
    detached and stay on the device, so that a step costs no host sync. Only `training_step` has a `loss`.
    """

    loss: Tensor
    nll_sum: Tensor
    count: Tensor
    samples: int
    tokens_nominal: int
    tokens_real: Tensor


class SplitLossModule(Protocol):
    """A module whose loss is split by modality.

    It may have a method `scalars() -> dict[str, float]`: more values of the moment, written with the training loss. Its
    `gradient_norm` is set before each update to the total norm of the gradient as it is then (`NonFiniteGuard`).
    """

    modalities: tuple[str, ...]


class Extras(Protocol):
    """A callback that adds fields to the training lines of metrics.jsonl."""

    def record(self, seen: dict[str, int]) -> dict[str, Any]:
        """Fields for the interval that ends now; `seen` counts samples and tokens since the run began."""
        ...


def record_head(trainer: Any, seen: dict[str, int]) -> dict[str, Any]:
    """The fields that open every line of metrics.jsonl: step, samples, tokens and learning rate."""
    optimizers = trainer.optimizers
    rate = float(optimizers[0].param_groups[0]["lr"]) if optimizers else 0.0
    return {"step": int(trainer.global_step), **seen, "lr": rate}

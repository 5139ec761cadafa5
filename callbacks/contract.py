"""What the callbacks expect of a module's steps, and the account of what a run has seen."""

from typing import Any, Protocol, TypedDict

from torch import Tensor


class StepOutput(TypedDict, total=False):
    """What `training_step` and `validation_step` return, per rank and micro-batch.

    `nll_sum` (M,) and `count` (M,) follow the module's `modalities`; detached, on the device.
    """

    loss: Tensor
    nll_sum: Tensor
    count: Tensor
    samples: int
    tokens_nominal: int
    tokens_real: Tensor


class SplitLossModule(Protocol):
    """A module whose loss is split by modality."""

    modalities: tuple[str, ...]


def record_head(trainer: Any, seen: dict[str, int]) -> dict[str, Any]:
    """The fields that open every line of metrics.jsonl: step, samples, tokens and learning rate."""
    optimizers = trainer.optimizers
    rate = float(optimizers[0].param_groups[0]["lr"]) if optimizers else 0.0
    return {"step": int(trainer.global_step), **seen, "lr": rate}

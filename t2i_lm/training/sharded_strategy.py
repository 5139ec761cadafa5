"""Sharded training (`trainer.strategy: fsdp2 | hsdp`), with checkpoints that any strategy and number of ranks reads.

Lightning's strategy writes a folder without an atomic rename and reads it unverified. Here each rank writes the part
of its shard beside a main file (`callbacks/files/checkpoint_parts.py`), and nothing is gathered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from callbacks.files.checkpoint_io import agree
from callbacks.files.checkpoint_parts import LocalRows, gathered, read_share, rows_of, shard_of
from callbacks.files.nested import mapped

SHARES = StateDictOptions()


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2, applied by the module's `configure_model`, with unsharded checkpoints."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Skips the reduction of gradients, as DDP does: one per step instead of one per micro-batch.

        Until the reduction, every process holds the gradients of the whole model.
        """
        assert self.model is not None
        sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in sharded:
                module.set_requires_gradient_sync(True, recurse=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state of the module, with sharded tensors as they are."""
        assert self.model is not None
        return get_model_state_dict(self.model, options=SHARES)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state in the form of `Optimizer.state_dict`, with sharded tensors as they are."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        assert self.model is not None
        return numbered(get_optimizer_state_dict(self.model, optimizer, options=SHARES))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Hands the rank's share to `storage_options`, which `RunCheckpoints` gives; else rank 0 gathers and writes."""
        if storage_options is None:
            checkpoint = gathered(checkpoint)
        if storage_options is not None or self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads, verifies and loads what this rank's shards need, which are in memory twice meanwhile."""
        assert self.model is not None
        parameters = dict(self.model.named_parameters())
        shard = shard_of(next(value for value in parameters.values() if isinstance(value, DTensor)))
        path = agree(Path(checkpoint_path), shard)
        checkpoint = read_share(path, shard)
        weights = _placed(checkpoint.pop("state_dict"), self.lightning_module_state_dict(), path)
        set_model_state_dict(self.model, weights, options=SHARES)
        del weights
        for optimizer, numbers in zip(self.optimizers, checkpoint.pop("optimizer_states"), strict=True):
            state = named(numbers, self.model, optimizer)
            for name, entry in state["state"].items():
                state["state"][name] = _placed(entry, dict.fromkeys(entry, parameters[name]), path)
            set_optimizer_state_dict(self.model, optimizer, state, options=SHARES)
        # Not tied to the file, which may be deleted.
        rest: dict[str, Any] = mapped(checkpoint, lambda value: isinstance(value, Tensor), Tensor.clone)
        return rest


def _placed(values: dict[str, Any], like: dict[str, Any], path: Path) -> dict[str, Any]:
    """The values, with each tensor distributed as that of the same name in `like`; copies of other tensors.

    Raises:
        ValueError: if a tensor has another shape.
    """

    def place(name: str, value: Any) -> Any:
        other = like.get(name)
        if isinstance(value, Tensor) and (value.ndim == 0 or not isinstance(other, DTensor)):
            return value.clone()
        if not isinstance(value, LocalRows | Tensor) or not isinstance(other, DTensor):
            return value
        if list(value.shape) != list(other.shape):
            raise ValueError(f"{path}: {name} has shape {list(value.shape)}, the model has {list(other.shape)}")
        if isinstance(value, Tensor):
            start, end = rows_of(len(value), shard_of(other))
            value = LocalRows([value[start:end]], list(value.shape))
        local = torch.empty_like(other.to_local())
        value.copy_to(local)
        return DTensor.from_local(
            local, other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride()
        )

    return {name: place(name, value) for name, value in values.items()}


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state keyed by position, as in `Optimizer.state_dict`, from one keyed by name."""
    order = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(order)}
    groups = [group | {"params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {number[name]: entry for name, entry in state["state"].items()}, "param_groups": groups}


def named(state: dict[str, Any], model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The inverse of `numbered`, for the parameters of this optimizer in their order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [group | {"params": [order[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": {order[index]: entry for index, entry in state["state"].items()}, "param_groups": groups}

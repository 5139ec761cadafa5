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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from callbacks.files.checkpoint_parts import gathered

FULL, SHARES = StateDictOptions(full_state_dict=True, cpu_offload=True), StateDictOptions()


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
        """Reads and verifies the file on every rank, and loads this rank's shards."""
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(Path(checkpoint_path), weights_only=True)
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=FULL)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, named(state, self.model, optimizer), options=FULL)
        return checkpoint


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

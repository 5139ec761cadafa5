"""What the collectives of a run are: reductions of gradients in every backward pass, time-outs of groups."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from t2i_lm.runtime.launch import global_rank
from t2i_lm.training.ranks import WatchedShards

# Operations that bring gradients together; all-gathers bring weights.
REDUCTIONS = ("reduce_scatter", "allreduce")


def count_reductions(file: Path, train: Callable[[], int]) -> int:
    """Trains, and writes the number of reductions of each backward pass of rank 0 into a file; the exit code."""
    counts: list[int] = []
    backward = Strategy.backward

    def counted(self: Strategy, *arguments: Any, **named: Any) -> Any:
        with CommDebugMode() as mode:
            loss = backward(self, *arguments, **named)
        asked = {str(operation): count for operation, count in mode.get_comm_counts().items()}
        counts.append(sum(count for name, count in asked.items() if any(word in name for word in REDUCTIONS)))
        return loss

    Strategy.backward = counted  # type: ignore[method-assign]
    code = train()
    if global_rank() == 0:
        file.write_text(json.dumps(counts))
    return code


def note_timeouts(file: Path, train: Callable[[], int]) -> int:
    """Trains with sharded weights, and writes the time-outs in seconds of their process groups; the exit code."""
    setup = WatchedShards.setup

    def noting(self: WatchedShards, trainer: pl.Trainer) -> None:
        setup(self, trainer)
        assert self.model is not None
        mesh = next(value.device_mesh for value in self.model.parameters() if isinstance(value, DTensor))
        backends = [group._get_backend(torch.device("cpu")) for group in mesh.get_all_groups()]
        file.write_text(json.dumps([backend.options._timeout.total_seconds() for backend in backends]))

    WatchedShards.setup = noting  # type: ignore[method-assign]
    return train()

"""Counts the reductions of gradients in every backward pass of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch.distributed.tensor.debug import CommDebugMode

from t2i_lm.runtime.launch import global_rank

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

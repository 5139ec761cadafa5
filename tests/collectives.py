"""`python -m tests.collectives FILE ...`: `t2i_lm.train ...` that counts reductions per backward pass into FILE."""

import json
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch.distributed.tensor.debug import CommDebugMode

from t2i_lm.runtime.devices import global_rank
from t2i_lm.train import main

# Operations that bring gradients together; all-gathers bring weights.
REDUCTIONS = ("reduce_scatter", "allreduce")


def count_reductions(counts: list[int]) -> None:
    """Makes every backward pass append its number of reductions."""
    backward = Strategy.backward

    def counted(self: Strategy, *arguments: Any, **named: Any) -> Any:
        with CommDebugMode() as mode:
            loss = backward(self, *arguments, **named)
        asked = {str(operation): count for operation, count in mode.get_comm_counts().items()}
        counts.append(sum(count for name, count in asked.items() if any(word in name for word in REDUCTIONS)))
        return loss

    Strategy.backward = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    counts: list[int] = []
    count_reductions(counts)
    code = main(sys.argv[2:])
    if global_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(counts))
    sys.exit(code)

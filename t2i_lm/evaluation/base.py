"""What an evaluation measures."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from t2i_lm.experiment.build import ImageModel


@dataclass(frozen=True)
class EvaluationContext:
    """What is measured: a trained model, where its numbers go, and which rank of how many this is."""

    options: argparse.Namespace
    run: Path
    checkpoint: Path
    model: ImageModel
    out: Path
    rank: int = 0
    world: int = 1

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

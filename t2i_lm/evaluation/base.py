"""The interface of an evaluator, and the model that it measures.

Evaluators import torch inside functions, so that `--help` and wrong options are answered at once.
"""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.storage.run_folder import CHECKPOINTS
from t2i_lm.storage.sealed import read_sealed

if TYPE_CHECKING:
    from t2i_lm.experiment.build import ImageModel

# Entry of a result: when it was written. Files of earlier versions have none.
FINISHED = "finished"


@dataclass(frozen=True)
class EvaluationContext:
    """The trained model of a run, the folder of its results, and this process's rank.

    Attributes:
        run: the run folder.
        checkpoint: the file of the model's weights.
        checkpoint_sha256: its hash.
        model: in evaluation mode.
        out: folder of the results; made when the first one is written.
        rank: this process, of `world`.
        world: number of processes.
    """

    run: Path
    checkpoint: Path
    checkpoint_sha256: str
    model: "ImageModel"
    out: Path
    rank: int = 0
    world: int = 1

    def wait(self) -> None:
        """Blocks until every rank has called it."""
        if self.world > 1:
            import torch.distributed

            torch.distributed.barrier()


class Evaluator(ABC):
    """An evaluation of a finished run, constructed where the command line requests it.

    The constructor takes the parsed options and reads the inputs without torch, so that wrong ones are named before a
    model is loaded; it raises ValueError or OSError. `evaluate.EVALUATORS` gives each class its name NAME: the option
    that requests it, and the file OUT/NAME.json of its result.

    Attributes:
        title: heading of its options in `--help`.
        alone: why no other evaluator may run in the same command; empty where any may.
    """

    title: str
    alone: str = ""

    @abstractmethod
    def __init__(self, options: argparse.Namespace) -> None: ...

    @staticmethod
    @abstractmethod
    def add_arguments(add: Callable[..., Any]) -> None:
        """Adds the option NAME (default None) and the options that require it, with `add_argument` of a parser."""

    @abstractmethod
    def describe(self) -> str:
        """The lines of `--dry-run`."""

    @abstractmethod
    def identity(self, config: ExperimentConfig) -> dict[str, Any]:
        """What the result depends on besides the checkpoint; a result of other values is not overwritten."""

    @abstractmethod
    def run(self, context: EvaluationContext) -> dict[str, Any] | None:
        """Measures, called on every rank; rank 0 returns the result as JSON can hold it."""


def of_last_checkpoint(run: Path, checkpoint_sha256: str) -> bool:
    """Whether a result is of a run's last checkpoint; also where none is left to compare with.

    Args:
        run: the run folder.
        checkpoint_sha256: of the weights that were measured.
    """
    digests = sorted((run / CHECKPOINTS).glob("*.ckpt.sha256"))
    return not digests or checkpoint_sha256 in digests[-1].read_text(encoding="ascii", errors="replace")


def read_result(file: Path) -> dict[str, Any]:
    """The result of an evaluator, OUT/NAME.json, verified by its digest, which those of earlier versions lack.

    Raises:
        ValueError: naming the file, if it is damaged.
        OSError: if it cannot be opened.
    """
    return read_sealed(file, "restore it from a copy, or delete it and measure again")

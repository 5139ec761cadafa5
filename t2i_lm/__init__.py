"""t2i_lm: does a pre-trained language model help auto-regressive text-to-image generation?

`t2i_lm.load("runs/t2i_pretrained")` opens a trained run. Importing the package imports neither torch nor Lightning.
"""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2i_lm.evaluation.trained_run import TrainedRun

__all__ = ["load"]


def load(path: "str | PathLike[str]") -> "TrainedRun":
    """A trained run from its folder, or the newest run in a folder of runs; its model is read at first use.

    Raises:
        ValueError: if there is no run, naming what the folder holds.
    """
    from t2i_lm.evaluation.trained_run import open_run

    return open_run(path)

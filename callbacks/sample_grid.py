"""A grid of samples, and how much of it is right, at intervals of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from callbacks.base.periodic import Periodic, undisturbed
from callbacks.perplexity import EMASplitPerplexity


class SampleBatch(NamedTuple):
    """What was drawn: an image of the samples, and shares in [0, 1] by name."""

    grid: Image.Image
    accuracy: dict[str, float]


class SampleGrid(Periodic):
    """Draws on rank 0 every `interval` optimizer steps while the others wait.

    Writes FOLDER/step-NNNNNNNN.png, a line with `prompt_accuracy` to metrics.jsonl, and both to TensorBoard.
    """

    def __init__(self, interval: int, draw: Callable[[], SampleBatch], folder: Path, meter: EMASplitPerplexity) -> None:
        """`draw` samples from the module as it is; `meter` writes the line.

        Raises:
            ValueError: if `interval` is not positive.
        """
        super().__init__(interval)
        self.draw, self.folder, self.meter = draw, folder, meter

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Draws, and writes what was drawn."""
        head = self.meter.head(trainer)  # every rank must ask
        if not trainer.is_global_zero:
            return
        with undisturbed(pl_module):
            drawn = self.draw()
        self.folder.mkdir(parents=True, exist_ok=True)
        drawn.grid.save(self.folder / f"step-{step:08d}.png")
        if self.meter.file and drawn.accuracy:
            self.meter.file.append({**head, "prompt_accuracy": drawn.accuracy})
        scalars = {f"samples/{name}": value for name, value in drawn.accuracy.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=head["tokens_nominal"])
            if isinstance(logger, TensorBoardLogger):
                pixels_HWC = np.asarray(drawn.grid)
                logger.experiment.add_image("samples", pixels_HWC, head["tokens_nominal"], dataformats="HWC")

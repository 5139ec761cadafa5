"""A grid of samples, and how much of it is right, at intervals of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from callbacks.perplexity import EMASplitPerplexity


class Drawn(NamedTuple):
    """What was drawn: a picture of the samples, and shares in [0, 1] by name."""

    grid: Image.Image
    accuracy: dict[str, float]


class SampleGrid(Callback):
    """Draws on rank 0 every `interval` optimiser steps while the others wait.

    Writes FOLDER/step-NNNNNNNN.png, a line with `prompt_accuracy` to metrics.jsonl, and both to TensorBoard. It must
    draw from random streams of its own: the run's are not touched.
    """

    def __init__(self, interval: int, draw: Callable[[], Drawn], folder: Path, meter: EMASplitPerplexity) -> None:
        """`draw` samples from the module as it is; `meter` writes the line.

        Raises:
            ValueError: if `interval` is not positive.
        """
        if interval < 1:
            raise ValueError(f"interval={interval}: expected at least 1")
        self.interval, self.draw, self.folder, self.meter = interval, draw, folder, meter
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts after the step that was resumed from."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draws where an interval ends."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if step % self.interval:
            return
        head = self.meter.head(trainer)  # every rank must ask
        if not trainer.is_global_zero:
            return
        pl_module.eval()
        drawn = self.draw()
        pl_module.train()
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

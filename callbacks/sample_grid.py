"""A grid of samples and its accuracy, at intervals of a run."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from callbacks.base.periodic import Periodic, undisturbed
from callbacks.files.atomic import write_atomic
from callbacks.files.disk import tell
from callbacks.perplexity import EMASplitPerplexity


class SampleBatch(NamedTuple):
    """Samples as one image, and accuracies in [0, 1] by name."""

    grid: Image.Image
    accuracy: dict[str, float]


class SampleGrid(Periodic):
    """Samples on rank 0 every `interval` optimizer steps while the others wait.

    Writes FOLDER/step-NNNNNNNN.png, a line with `prompt_accuracy` to metrics.jsonl, and both to TensorBoard. Samples
    that fail, or cannot be written, are told in one line and end no run.
    """

    def __init__(
        self, interval: int, sample: Callable[[], SampleBatch], folder: Path, meter: EMASplitPerplexity
    ) -> None:
        """`sample` generates from the current module; `meter` writes the line.

        Raises:
            ValueError: if `interval` is not positive.
        """
        super().__init__(interval)
        self.sample, self.folder, self.meter = sample, folder, meter

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        head = self.meter.head(trainer)  # a collective call
        if not trainer.is_global_zero:
            return
        try:
            with undisturbed(pl_module):
                batch = self.sample()
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            print(f"no samples at step {step}: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
            return
        self._write(batch.grid, self.folder / f"step-{step:08d}.png")
        if self.meter.file and batch.accuracy:
            self.meter.file.append({**head, "prompt_accuracy": batch.accuracy})
        scalars = {f"samples/{name}": value for name, value in batch.accuracy.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=head["tokens_nominal"])
            if isinstance(logger, TensorBoardLogger):
                pixels_HWC = np.asarray(batch.grid)
                logger.experiment.add_image("samples", pixels_HWC, head["tokens_nominal"], dataformats="HWC")

    def _write(self, grid: Image.Image, file: Path) -> None:
        content = io.BytesIO()
        grid.save(content, format="png")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, content.getvalue())
        except OSError as error:
            tell(f"{error}; training continues")

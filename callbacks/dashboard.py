"""Dashboard of a run in TensorBoard: charts of the paper's figures, hyperparameters, texts and figures as images."""

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

# Columns of the table of hyperparameters, where a run has them: final losses.
FINAL = (
    "val/iid/image/nll",
    "val/iid/text/nll",
    "val/compositional/image/nll",
    "val/image/nll",
    "val/text/nll",
    "val/first/image/nll",
    "val/second/image/nll",
)
# Chart by title: regular expressions of its tags, each matched from a tag's start.
Charts = dict[str, list[str]]


def layout(validations: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """The custom scalars of every task, in TensorBoard's format.

    Every run writes all of it: TensorBoard shows one layout for all runs of a folder, and in each chart all runs that
    have its tags. Training, its average and each validation have charts of their own: TensorBoard smooths all curves of
    a page alike, which would bend those of few points.

    Args:
        validations: names of the validation sets in metrics.jsonl, such as `val/iid`.
    """
    categories = {
        "Figure 3: all tokens": _losses("", "all", validations) | _late("", "all", validations),
        "Figure 4: text tokens": _losses("", "text", validations) | _late("", "text", validations),
        "Figure 4: image tokens": _losses("", "image", validations) | _late("", "image", validations),
        "Figure 5: images without captions": _losses("unconditional/", "image", validations)
        | _late("unconditional/", "image", validations),
        "Figure 6: alignment of image rows": {
            "contrastive loss, average": ["align/train/all/nll_ema$"],
            "contrastive loss, raw": ["align/train/all/nll$"],
            "contrastive loss, held-out pairs": ["align/val/(.*/)?all/nll$"],
            "logit scale, 1 / temperature": ["align/train/logit_scale$"],
        },
        "Forgetting": {
            "loss of held-out text, text rows": ["forgetting/(second_)?text/text_rows/nll$"],
            "loss at the best temperature, text rows": ["forgetting/(second_)?text/text_rows/best_temperature/nll$"],
            "loss of held-out text, all rows": ["forgetting/(second_)?text/all_rows/nll$"],
            "top-1 accuracy, text rows": ["forgetting/(second_)?text/text_rows/top1$"],
            "accuracy of questions, text rows": ["forgetting/tasks/.*/text_rows/accuracy$"],
        },
        "Samples": {"prompt accuracy": ["samples/"]},
        "Optimization": {"learning rate": ["optim/lr$"], "tokens per second": ["throughput/tokens_per_s$"]},
    }
    return {
        category: {title: ["Multiline", tags] for title, tags in charts.items()}
        for category, charts in categories.items()
    }


def _losses(prefix: str, modality: str, validations: Sequence[str]) -> Charts:
    """Loss of a modality: average, raw and each validation set; nats/token, so that perplexity is on a log scale."""
    return {
        "loss, average": [f"{prefix}train/{modality}/nll_ema$"],
        "loss, raw": [f"{prefix}train/{modality}/nll$"],
        **{title: [f"{prefix}{key}/{modality}/nll$"] for title, key in _titles(validations).items()},
        "perplexity, average": [f"{prefix}train/{modality}/ppl_ema$"],
    }


def _late(prefix: str, modality: str, validations: Sequence[str]) -> Charts:
    """The same without the start of the run, whose loss would flatten the rest."""
    return {
        "late, average": [f"{prefix}late/train/{modality}/nll_ema$"],
        **{f"late, {title}": [f"{prefix}late/{key}/{modality}/nll$"] for title, key in _titles(validations).items()},
    }


def _titles(validations: Sequence[str]) -> dict[str, str]:
    return {f"validation{name.removeprefix('val').replace('/', ', ')}": name for name in validations}


class Dashboard(Callback):
    """Writes the layout, texts and hyperparameters at the start, and figures as images after every validation.

    Only rank 0 writes, and only to TensorBoard. A figure that fails is told in one line and ends no run.
    """

    def __init__(
        self,
        validations: Sequence[str],
        hyperparameters: Mapping[str, bool | int | float | str],
        texts: Mapping[str, str],
        draw: Callable[[], Mapping[str, Image.Image]],
        position: Callable[[int], int],
    ) -> None:
        """Nothing is written before training starts.

        Args:
            validations: names of the validation sets in metrics.jsonl, such as `val/iid`.
            hyperparameters: the run's row in the table of hyperparameters.
            texts: plain text by title.
            draw: figures by title, read from the run's files.
            position: place on the axis of the run's scalars at an optimizer step.
        """
        self.position = position
        self.validations, self.hyperparameters, self.texts, self.draw = validations, hyperparameters, texts, draw
        self._session_end: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for writer in _writers(trainer):
            row: Any = dict(self.hyperparameters)
            experiment, start, self._session_end = hparams(row, dict.fromkeys(FINAL, 0.0))  # type: ignore[no-untyped-call]
            if trainer.global_step and len(list(Path(writer.log_dir).glob("events.out.tfevents.*"))) > 1:
                continue  # of a resumed run, an earlier session wrote them
            writer.add_custom_scalars(layout(self.validations))
            for title, text in self.texts.items():
                writer.add_text(title, textwrap.indent(text, "    "))  # a block of code in Markdown
            for summary in (experiment, start):
                _add(writer, summary)
            writer.flush()  # a kill must not lose what is written once

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._session_end is not None and trainer.global_step >= trainer.max_steps:
            for writer in _writers(trainer):
                _add(writer, self._session_end)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for writer in _writers(trainer):
            try:
                figures = self.draw()
            except Exception as error:
                reason = next(iter(str(error).splitlines()), "")
                print(f"no figures in TensorBoard: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
                return
            for title, image in figures.items():
                place = self.position(trainer.global_step)
                writer.add_image(title, np.asarray(image), place, dataformats="HWC")


def _writers(trainer: pl.Trainer) -> list[SummaryWriter]:
    """The TensorBoard writers of rank 0."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def _add(writer: SummaryWriter, summary: Any) -> None:
    writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]

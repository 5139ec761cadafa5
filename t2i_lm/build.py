"""The composition root: ExperimentConfig -> module, data and Trainer. Alone imports `callbacks`."""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from callbacks import (
    DurableCheckpointIO,
    EMASplitPerplexity,
    NonFiniteGuard,
    Preemption,
    RngState,
    RunCheckpoints,
    RunProgress,
    RunScalars,
    Throughput,
)
from callbacks import EventLog as EventLog
from callbacks import MetricsFile as MetricsFile
from callbacks import Preempted as Preempted
from callbacks import find_resumable as find_resumable
from t2i_lm.aligned import read_aligned_rows
from t2i_lm.assets import resolve
from t2i_lm.backbones import build_backbone, choose_trained
from t2i_lm.config import ExperimentConfig
from t2i_lm.data.bags import BagDataModule
from t2i_lm.data.datamodules import BatchDataModule, PairDataModule, PictureDataModule, TextDataModule
from t2i_lm.data.preparation import prepare_pairs, prepare_text
from t2i_lm.data.tokens import read_index
from t2i_lm.devices import multiplies_bfloat16
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.expand import ImageRowSource, expand_vocabulary
from t2i_lm.modules.alignment import AlignmentModule
from t2i_lm.modules.image_tokenizer import ImageTokenizerModule
from t2i_lm.modules.text import TextModule
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.modules.unconditional import UnconditionalImageModule
from t2i_lm.runs import METRICS
from t2i_lm.seeds import generator
from t2i_lm.sequence import ImageLayout, Layout
from t2i_lm.tokenizers.base import ImageTokenizer, TextTokenizer
from t2i_lm.tokenizers.image import open_image_tokenizer
from t2i_lm.tokenizers.text import open_text_tokenizer
from t2i_lm.tokenizers.vq import PatchedVQ
from t2i_lm.vocab import JointVocab

CHECKPOINTS = "checkpoints"

# Warnings of Lightning that do not hold here: loading is no bottleneck, and the data module resumes exactly.
QUIET = (
    ".*does not have many workers.*",
    ".*resuming from a checkpoint that ended before the epoch ended.*",
    "The number of training batches.*",
    ".*isinstance.treespec, LeafSpec.*",
)


@dataclass
class Experiment:
    """A built experiment: what is trained on what, and what its report needs."""

    config: ExperimentConfig
    module: pl.LightningModule
    data: BatchDataModule
    index: dict[str, Any] = field(default_factory=dict)  # of the token shards
    shards: Path | None = None
    text: TextTokenizer | None = None
    image: ImageTokenizer | None = None
    layout: Layout | ImageLayout | None = None


def open_text(config: ExperimentConfig) -> TextTokenizer:
    """The experiment's text tokenizer."""
    assert config.text_tokenizer.path is not None
    return open_text_tokenizer(resolve(config.text_tokenizer.path))


def open_image(config: ExperimentConfig, rank: int = 0) -> ImageTokenizer:
    """The experiment's image tokenizer, on the GPU of that number where there is one.

    Raises:
        ValueError: if the experiment draws samples and the tokenizer has no decoder.
    """
    settings = config.image_tokenizer
    assert settings.path is not None
    image = open_image_tokenizer(resolve(settings.path), settings.size, settings.expect)
    if torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu", "cuda"):
        image.to(torch.device("cuda", rank))
    if config.samples.prompts and not image.decodes:
        raise ValueError(
            f"samples.prompts={config.samples.prompts}: image_tokenizer.path has no decoder to draw with; "
            "set samples.prompts=0"
        )
    return image


def prepare(config: ExperimentConfig, rank: int = 0) -> Path:
    """The folder of the experiment's token shards, written where they are missing."""
    if config.task == "text":
        return prepare_text(config)[0]
    return prepare_pairs(config, open_text(config), open_image(config, rank))


def build_expanded(config: ExperimentConfig) -> tuple[Backbone, JointVocab, TextTokenizer, ImageTokenizer]:
    """The expanded decoder and the tokenizers that its rows belong to.

    Raises:
        ValueError: if the text tokenizer is not the backbone's, or the aligned rows belong to other tokenizers.
    """
    text, image = open_text(config), open_image(config, int(os.environ.get("LOCAL_RANK", "0")))
    decoder = build_backbone(config)
    if text.vocab_size > decoder.config.vocab_size:
        raise ValueError(
            f"text_tokenizer.path has {text.vocab_size} pieces but the backbone {decoder.config.vocab_size} rows: "
            "this is not the tokenizer that the backbone was trained with"
        )
    rows = config.image_rows
    source = ImageRowSource(
        image.codebook if rows == "codebook" else None,
        read_aligned_rows(config, text.sha256, image.sha256) if rows == "aligned" else None,
    )
    vocab = expand_vocabulary(decoder, image.vocab_size, generator(config.seed, "new rows"), rows, source)
    return decoder, vocab, text, image


def build_pictures(config: ExperimentConfig) -> Experiment:
    """The expanded decoder on caption-image pairs, or on their pictures alone."""
    decoder, vocab, text, image = build_expanded(config)
    choose_trained(decoder, config)
    if config.loss_rows == "image" and not decoder.config.weight_tying:
        for rows in (decoder.output.text, decoder.output.special):  # not in the graph, which DDP would wait for
            assert rows is not None
            rows.requires_grad_(False)
    shards = prepare_pairs(config, text, image)
    image.to(torch.device("cpu"))  # leaves the GPU to training
    image_tokens = image.grid[0] * image.grid[1]
    layout: Layout | ImageLayout
    module: TextToImageModule | UnconditionalImageModule
    if config.task == "unconditional":
        layout = ImageLayout(vocab, image_tokens)
        module = UnconditionalImageModule(decoder, config, layout)
    else:
        layout = Layout(vocab, image_tokens, config.data.length)
        module = TextToImageModule(decoder, config, layout)
    data = PairDataModule(config, shards, layout)
    return Experiment(config, module, data, _index(shards), shards, text, image, layout)


def build_alignment(config: ExperimentConfig) -> Experiment:
    """The embedding rows of the expanded decoder, image rows against text rows."""
    decoder, _, text, image = build_expanded(config)
    shards = prepare_pairs(config, text, image)
    module, data = AlignmentModule(decoder.tok_embeddings, config), BagDataModule(config, shards)
    return Experiment(config, module, data, _index(shards), shards, text, image)


def build_text(config: ExperimentConfig) -> Experiment:
    """A decoder from random weights on plain text."""
    decoder = build_backbone(config)
    choose_trained(decoder, config)
    shards, text = prepare_text(config)
    if text.vocab_size != decoder.config.vocab_size:
        raise ValueError(
            f"text_tokenizer.vocab_size={text.vocab_size}: backbone.config has vocab_size={decoder.config.vocab_size}"
        )
    data = TextDataModule(config, shards)
    return Experiment(config, TextModule(decoder, config), data, _index(shards), shards, text)


def build_image_tokenizer(config: ExperimentConfig) -> Experiment:
    """An image tokenizer from random weights on pictures."""
    state = torch.get_rng_state()
    torch.manual_seed(config.seed)  # diffusers draws from the global stream
    model = PatchedVQ(config.image_tokenizer.model)
    torch.set_rng_state(state)
    return Experiment(config, ImageTokenizerModule(model, config), PictureDataModule(config))


def _index(shards: Path) -> dict[str, Any]:
    return read_index(shards) or {}


TASKS: dict[str, Callable[[ExperimentConfig], Experiment]] = {
    "text_to_image": build_pictures,
    "unconditional": build_pictures,
    "align": build_alignment,
    "text": build_text,
    "image_tokenizer": build_image_tokenizer,
}


def build(config: ExperimentConfig) -> Experiment:
    """Builds an experiment's module and data, preparing token shards where they are absent."""
    config.require_paths()
    pl.seed_everything(config.seed, verbose=False)
    return TASKS[config.task](config)


def precision(config: ExperimentConfig) -> str:
    """bf16-mixed where the device multiplies in bfloat16, else float32; float32 master weights either way."""
    if config.trainer.precision != "auto":
        return config.trainer.precision
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu", "cuda")
    return "bf16-mixed" if multiplies_bfloat16("cuda" if on_gpu else "cpu") else "32-true"


def build_logger(config: ExperimentConfig, folder: Path) -> Logger | bool:
    """The logger named by `log.logger`; metrics.jsonl is written whatever it is."""
    name = config.log.logger
    if name == "tensorboard":
        return TensorBoardLogger(save_dir=folder, name="", version="tb", default_hp_metric=False)
    if name == "csv":
        return CSVLogger(save_dir=folder, name="", version="csv")
    if name == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(project="t2i_lm", name=folder.name, save_dir=folder)
    return False


def write_text(config: ExperimentConfig, folder: Path, tag: str, markdown: str) -> None:
    """Puts a text beside a run's curves, where its logger is TensorBoard."""
    logger = build_logger(config, folder)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(tag, markdown)
        logger.finalize("success")


def build_trainer(config: ExperimentConfig, folder: Path, events: EventLog, resumed: bool) -> pl.Trainer:
    """The Trainer of a run, with all callbacks. A new run is validated once before its first step.

    Order matters: throughput first, so that other callbacks count as work; the guard before the meters; progress
    after the meter that it shows; random state after all that draw; the saver last, when all have seen the step.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    trainer = config.trainer
    metrics = folder / METRICS
    throughput = Throughput()
    meter: EMASplitPerplexity | RunScalars
    if config.task == "image_tokenizer":
        meter = RunScalars(config.log.interval, metrics)
    else:
        meter = EMASplitPerplexity(config.log.interval, config.log.ema, metrics, extras=[throughput])
    saver = RunCheckpoints(folder / CHECKPOINTS, trainer.checkpoint_interval, metrics=meter.file, events=events)
    callbacks = [
        throughput,
        Preemption(saver),
        NonFiniteGuard(events=events),
        meter,
        RunProgress(meter, config.log.interval),
        RngState(config.seed, events),
        saver,
    ]
    if trainer.threads:
        torch.set_num_threads(trainer.threads)
    ranks = trainer.devices * trainer.num_nodes
    # Buffers are tables, or counts that the module adds up itself: broadcasting them in every forward would also hang
    # a validation in which ranks have different numbers of batches.
    strategy = DDPStrategy(broadcast_buffers=False) if trainer.strategy == "ddp" or ranks > 1 else "auto"
    return pl.Trainer(
        max_steps=trainer.max_steps,
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=strategy,
        precision=precision(config),  # type: ignore[arg-type]
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=config.optim.grad_clip,
        val_check_interval=min(trainer.val_check_interval, trainer.max_steps) * trainer.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        logger=build_logger(config, folder),
        callbacks=callbacks,
        plugins=[DurableCheckpointIO()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0 if resumed else -1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

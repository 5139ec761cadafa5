"""The composition root: ExperimentConfig -> module, data and Trainer. Alone imports `callbacks`."""

import hashlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

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
from t2i_lm.assets import resolve
from t2i_lm.config import ExperimentConfig
from t2i_lm.data.datamodules import BatchDataModule, PairDataModule, PictureDataModule, TextDataModule
from t2i_lm.data.tokens import read_index
from t2i_lm.devices import multiplies_bfloat16
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.decoder import Decoder, DecoderConfig
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.freeze import freeze, tune_only
from t2i_lm.models.huggingface import HuggingFaceDecoder, empty_huggingface, is_huggingface, load_huggingface
from t2i_lm.models.open_lm import decoder_config, load_open_lm
from t2i_lm.modules.image_tokenizer import ImageTokenizerModule
from t2i_lm.modules.text import TextModule
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.prepare import prepare_pairs, prepare_text
from t2i_lm.runs import METRICS
from t2i_lm.sequence import Layout
from t2i_lm.tokenizers.base import ImageTokenizer, TextTokenizer
from t2i_lm.tokenizers.text import open_text_tokenizer
from t2i_lm.tokenizers.vq import PatchedVQ, open_image_tokenizer

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
    layout: Layout | None = None


def generator(seed: int, purpose: str) -> torch.Generator:
    """A random stream of its own for each purpose, so that draws of one never shift another's."""
    digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def decoder_architecture(config: ExperimentConfig, length: int) -> DecoderConfig:
    """The unexpanded decoder's config; its rotary table is long enough for `length` positions.

    Raises:
        ValueError: if the config names no architecture, or a file that is not one.
    """
    backbone = config.backbone
    path = resolve(backbone.path) if backbone.path else None
    source = backbone.config or (path if path is None or path.is_dir() else path.parent)
    if source is None:
        raise ValueError("backbone.config=null: give a preset, a model JSON, or backbone.path with a config.json")
    if isinstance(source, Path):
        source = source / "config.json"
    known = decoder_config(source, positional_embedding_type=backbone.positional)
    return replace(known, seq_len=max(known.seq_len, backbone.seq_len or 0, length))


def empty_backbone(config: ExperimentConfig) -> Backbone:
    """The unexpanded backbone, its weights yet to be drawn.

    Raises:
        ValueError: if it has fewer positions than `data.length`.
    """
    folder = resolve(config.backbone.config or config.backbone.path or ".")
    if is_huggingface(folder):
        return _with_positions(empty_huggingface(folder), config)
    return Decoder(decoder_architecture(config, config.data.length))


def build_backbone(config: ExperimentConfig) -> Backbone:
    """The unexpanded backbone, pre-trained or drawn from the seed; both arms take this path.

    Raises:
        ValueError: if weights cannot be read or do not fit.
    """
    if config.init == "pretrained":
        assert config.backbone.path is not None
        path = resolve(config.backbone.path)
        if is_huggingface(path):
            return _with_positions(load_huggingface(path), config)
        return load_open_lm(path, vars(decoder_architecture(config, config.data.length)))
    backbone = empty_backbone(config)
    backbone.reset_parameters(generator(config.seed, "decoder"))
    return backbone


def _with_positions(backbone: HuggingFaceDecoder, config: ExperimentConfig) -> HuggingFaceDecoder:
    if config.data.length > backbone.config.seq_len:
        raise ValueError(f"data.length={config.data.length}: the backbone has {backbone.config.seq_len} positions")
    return backbone


def choose_trained(decoder: Backbone, config: ExperimentConfig) -> None:
    """Freezes what `tune` and `freeze` say; before a strategy wraps the decoder."""
    tune_only(decoder, config.tune)
    if config.freeze:
        freeze(decoder, config.freeze)


def build_text_to_image(config: ExperimentConfig) -> Experiment:
    """The expanded decoder on caption-image pairs."""
    settings = config.image_tokenizer
    assert config.text_tokenizer.path is not None
    assert settings.path is not None
    text = open_text_tokenizer(resolve(config.text_tokenizer.path))
    image = open_image_tokenizer(resolve(settings.path), settings.size, settings.expect)
    shards = prepare_pairs(config, text, image)
    decoder = build_backbone(config)
    if text.vocab_size > decoder.config.vocab_size:
        raise ValueError(
            f"text_tokenizer.path has {text.vocab_size} pieces but the backbone {decoder.config.vocab_size} rows: "
            "this is not the tokenizer that the backbone was trained with"
        )
    vocab = expand_vocabulary(decoder, image.vocab_size, generator(config.seed, "new rows"))
    choose_trained(decoder, config)
    layout = Layout(vocab, image.grid[0] * image.grid[1], config.data.length)
    module = TextToImageModule(decoder, config, layout)
    data = PairDataModule(config, shards, layout)
    return Experiment(config, module, data, _index(shards), shards, text, image, layout)


def build_text(config: ExperimentConfig) -> Experiment:
    """A decoder from random weights on plain text."""
    decoder = build_backbone(config)
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
    "text_to_image": build_text_to_image,
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
    strategy = "ddp" if trainer.strategy == "ddp" or ranks > 1 else "auto"
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

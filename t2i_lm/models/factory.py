"""The language model of an experiment: read or drawn, and which of its parameters learn."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, nn

from t2i_lm.assets import resolve
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.decoder import Decoder, DecoderConfig
from t2i_lm.models.float8 import float8_layers
from t2i_lm.models.freeze import freeze, tune_only
from t2i_lm.models.fsdp import blocks_of
from t2i_lm.models.huggingface import HuggingFaceDecoder, empty_huggingface, is_huggingface, load_huggingface
from t2i_lm.models.lora import add_adapters
from t2i_lm.models.open_lm import PRESETS, decoder_config, load_open_lm
from t2i_lm.runtime.devices import can_compile
from t2i_lm.runtime.seeds import generator


@torch.no_grad()
def shuffle_entries(model: nn.Module, generator: Generator) -> None:
    """Permutes the entries of every tensor within it: the same statistics, no knowledge."""
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator)
        parameter.copy_(parameter.flatten()[order.to(parameter.device)].view_as(parameter))


@torch.no_grad()
def copy_text_rows(source: Backbone, target: Backbone) -> None:
    """Gives `target` the embedding and output rows of `source`, both unexpanded."""
    target.tok_embeddings.text.copy_(source.tok_embeddings.text)
    target.output.text.copy_(source.output.text)


def decoder_architecture(config: ExperimentConfig, length: int) -> DecoderConfig:
    """The unexpanded decoder's config; its rotary table is long enough for `length` positions.

    Raises:
        ValueError: if the config names no architecture, or a file that is not one.
    """
    backbone = config.backbone
    source: str | Path | None = backbone.config
    if source is None and backbone.path is not None:
        path = resolve(backbone.path)
        if not path.exists():
            raise ValueError(f"backbone.path={backbone.path}: no such file or folder")
        source = (path if path.is_dir() else path.parent) / "config.json"
    if source is None:
        raise ValueError("backbone.config=null: give a preset, a model JSON, or backbone.path with a config.json")
    known = decoder_config(source, positional_embedding_type=backbone.positional)
    return replace(known, seq_len=max(known.seq_len, backbone.seq_len or 0, length))


def huggingface_folder(config: ExperimentConfig) -> Path | None:
    """The folder of a `transformers` model, from `backbone.config` or else `backbone.path`; None for open_lm."""
    named = config.backbone.config or config.backbone.path
    if named is None or named in PRESETS:
        return None
    folder = resolve(named)
    return folder if is_huggingface(folder) else None


def empty_backbone(config: ExperimentConfig) -> Backbone:
    """The unexpanded backbone, its weights yet to be drawn.

    Raises:
        ValueError: if it has fewer positions than `data.length`.
    """
    folder = huggingface_folder(config)
    if folder is not None:
        return _with_positions(empty_huggingface(folder), config)
    return Decoder(decoder_architecture(config, config.data.length))


def pretrained_backbone(config: ExperimentConfig) -> Backbone:
    """The weights at `backbone.path`.

    Raises:
        ValueError: if they cannot be read or do not fit.
    """
    assert config.backbone.path is not None
    if huggingface_folder(config) is not None:
        return _with_positions(load_huggingface(resolve(config.backbone.path)), config)
    return load_open_lm(resolve(config.backbone.path), vars(decoder_architecture(config, config.data.length)))


def random_backbone(config: ExperimentConfig) -> Backbone:
    """All weights drawn from the seed."""
    backbone = empty_backbone(config)
    backbone.reset_parameters(generator(config.seed, "decoder"))
    return backbone


def shuffled_backbone(config: ExperimentConfig) -> Backbone:
    """The pre-trained tensors, the entries of each permuted."""
    backbone = pretrained_backbone(config)
    shuffle_entries(backbone, generator(config.seed, "shuffle"))
    return backbone


def body_only_backbone(config: ExperimentConfig) -> Backbone:
    """Everything but the embedding and output rows is pre-trained."""
    backbone = pretrained_backbone(config)
    copy_text_rows(random_backbone(config), backbone)
    return backbone


def embeddings_only_backbone(config: ExperimentConfig) -> Backbone:
    """Only the embedding and output rows are pre-trained."""
    backbone = random_backbone(config)
    copy_text_rows(pretrained_backbone(config), backbone)
    return backbone


# `init` -> the unexpanded backbone. `aligned` differs from `pretrained` in its new image rows.
INITIALIZATIONS: dict[str, Callable[[ExperimentConfig], Backbone]] = {
    "pretrained": pretrained_backbone,
    "random": random_backbone,
    "shuffled": shuffled_backbone,
    "body_only": body_only_backbone,
    "embeddings_only": embeddings_only_backbone,
    "aligned": pretrained_backbone,
}


def build_backbone(config: ExperimentConfig) -> Backbone:
    """The unexpanded backbone as `init` says; all arms take this path.

    Raises:
        ValueError: if weights cannot be read or do not fit.
    """
    return INITIALIZATIONS[config.init](config)


def _with_positions(backbone: HuggingFaceDecoder, config: ExperimentConfig) -> HuggingFaceDecoder:
    if config.data.length > backbone.config.seq_len:
        raise ValueError(f"data.length={config.data.length}: the backbone has {backbone.config.seq_len} positions")
    return backbone


def choose_trained(decoder: Backbone, config: ExperimentConfig) -> None:
    """Freezes what `tune` and `freeze` say, and adds adapters; before a strategy wraps the decoder."""
    tune_only(decoder, config.tune)
    if config.freeze:
        freeze(decoder, config.freeze)
    if config.lora.rank:
        add_adapters(decoder, config.lora.rank, config.lora.alpha, generator(config.seed, "adapters"))


def prepare_blocks(decoder: Backbone, config: ExperimentConfig) -> None:
    """Packing, recomputation and compilation, as the trainer's keys say; before a strategy wraps the decoder.

    Raises:
        ValueError: if the backbone cannot be packed or has no layers for float8, which training alone turns on.
    """
    if config.trainer.packing:
        decoder.enable_packing()
    if config.trainer.fp8:
        float8_layers(decoder)
    if config.trainer.activation_checkpointing:
        decoder.enable_activation_checkpointing()
    if config.trainer.compile and can_compile("trainer.compile"):
        for block in blocks_of(decoder):
            block.compile()

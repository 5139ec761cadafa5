"""The language model of an experiment: its backbone by format and initialization, and its trainable parameters."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from t2i_lm.assets import resolve
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.presets import PRESETS
from t2i_lm.config.sections import is_plugin, require
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.decoder import Decoder, DecoderConfig
from t2i_lm.models.float8 import float8_layers
from t2i_lm.models.freeze import freeze, tune_only
from t2i_lm.models.fsdp import blocks_of
from t2i_lm.models.huggingface_folder import base_folder, empty_huggingface, is_huggingface, load_huggingface
from t2i_lm.models.image_adapters import restrict_adapters
from t2i_lm.models.lora import add_adapters
from t2i_lm.models.matched_weights import draw_entries, draw_mimetic, shuffle_entries
from t2i_lm.models.modality_experts import add_modality_experts
from t2i_lm.models.open_lm import decoder_config, load_open_lm
from t2i_lm.runtime.devices import can_compile
from t2i_lm.runtime.plugins import BACKBONE, find_plugin
from t2i_lm.runtime.seeds import generator
from t2i_lm.storage.hashing import known_sha256, weights_sha256
from t2i_lm.storage.reading import require_regular_files
from t2i_lm.tokenizers.joint_vocab import JointVocab


@torch.no_grad()
def copy_text_rows(source: Backbone, target: Backbone) -> None:
    """Gives `target` the embedding and output rows of `source`, both unexpanded."""
    target.tok_embeddings.text.copy_(source.tok_embeddings.text)
    target.output.text.copy_(source.output.text)
    if source.output.bias is not None:
        assert target.output.bias is not None
        target.output.bias.copy_(source.output.bias)


def decoder_architecture(config: ExperimentConfig, length: int) -> DecoderConfig:
    """The unexpanded open_lm decoder's config, with rotary tables of at least `length` positions.

    Raises:
        ValueError: if the config has no architecture, or a file that is not one.
    """
    backbone = config.backbone
    source: str | Path | None = backbone.config
    if source is None and backbone.path is not None:
        path = resolve(backbone.path, "backbone.path")
        if not path.exists():
            raise ValueError(f"backbone.path={backbone.path}: no such file or folder")
        source = (path if path.is_dir() else path.parent) / "config.json"
        if not source.is_file():
            raise ValueError(
                f"backbone.path={backbone.path}: there is no {source}, which states the sizes of the model; or name a "
                "preset or such a file by backbone.config"
            )
    if source is None:
        raise ValueError("backbone.config=null: give a preset, a model JSON, or backbone.path with a config.json")
    try:
        known = decoder_config(source, positional_embedding_type=backbone.positional)
    except ValueError as error:
        positional = backbone.positional is not None and "positional_embedding_type" in str(error)
        key = "positional" if positional else "path" if backbone.config is None else "config"
        raise ValueError(f"backbone.{key}: {error}") from error
    return replace(known, seq_len=max(known.seq_len, backbone.seq_len or 0, length))


# The first token of an image, which is computed as one.
IMAGE_START = "<image>"
# Weights in formats of other programs.
UNREADABLE = (".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".mlmodel", ".nemo")


def huggingface_folder(config: ExperimentConfig) -> Path | None:
    """The folder of a `transformers` model, from `backbone.config` or else `backbone.path`; None for open_lm.

    Raises:
        ValueError: if the path is a file of such a folder, or of another program.
    """
    key, named = next(
        ((key, value) for key in ("config", "path") if (value := getattr(config.backbone, key)) is not None), ("", None)
    )
    if named is None or named in PRESETS:
        return None
    folder = resolve(named, f"backbone.{key}")
    require_regular_files(folder)
    if folder.suffix in UNREADABLE and folder.is_file():
        raise ValueError(
            f"backbone.{key}={named}: {folder.suffix} files are not read; expected a transformers folder with "
            "safetensors or .bin weights, or open_lm's .pt or safetensors"
        )
    if folder.is_file() and (key == "path" or folder.name == "config.json") and is_huggingface(folder.parent):
        raise ValueError(f"backbone.{key}={named}: a file of a transformers model; give its folder, {folder.parent}")
    return folder if is_huggingface(folder) else None


@dataclass(frozen=True)
class BackboneFormat:
    """A library's backbones.

    Attributes:
        recognizes: whether a config selects one.
        empty: the unexpanded backbone with uninitialized weights.
        pretrained: the weights at `backbone.path`.
    """

    name: str
    recognizes: Callable[[ExperimentConfig], bool]
    empty: Callable[[ExperimentConfig], Backbone]
    pretrained: Callable[[ExperimentConfig], Backbone]


def _empty_open_lm(config: ExperimentConfig) -> Backbone:
    return Decoder(decoder_architecture(config, config.data.length))


def _pretrained_open_lm(config: ExperimentConfig) -> Backbone:
    assert config.backbone.path is not None
    path, wanted = resolve(config.backbone.path, "backbone.path"), decoder_architecture(config, config.data.length)
    own = (path if path.is_dir() else path.parent) / "config.json"
    if own.is_file() and (trained := _architecture_in(own)) is not None:
        _require_trained_architecture(config, wanted, trained)
    return load_open_lm(path, vars(wanted))


def _architecture_in(file: Path) -> DecoderConfig | None:
    """The architecture that a config.json beside open_lm weights states; None for one of another program."""
    try:
        return decoder_config(file)
    except ValueError:  # where `backbone.config` is null, the same file has just been refused
        return None


def _require_trained_architecture(config: ExperimentConfig, wanted: DecoderConfig, trained: DecoderConfig) -> None:
    """Checks that weights get the architecture that they were trained with, which their shapes do not decide."""
    backbone, own = config.backbone, vars(trained)
    for name, value in vars(wanted).items():
        if name == "seq_len" or value == own[name]:
            continue
        by_key = name == "positional_embedding_type" and backbone.positional is not None
        key, given = ("positional", backbone.positional) if by_key else ("config", backbone.config)
        word = own[name] if by_key else f"one with {name}={own[name]}"
        trained_with = f"null or {word}, with which the weights of {backbone.path} were trained"
        raise ValueError(f"backbone.{key}={given!r}: expected {trained_with}")


def _empty_huggingface(config: ExperimentConfig) -> Backbone:
    folder = huggingface_folder(config)
    assert folder is not None
    _require_own_positions(config)
    return empty_huggingface(folder)


def _require_own_positions(config: ExperimentConfig, whose: str = "a transformers backbone") -> None:
    for key in ("positional", "seq_len"):
        value = getattr(config.backbone, key)
        require(value is None, f"backbone.{key}", value, f"null, {whose} has its own positions")


def _pretrained_huggingface(config: ExperimentConfig) -> Backbone:
    assert config.backbone.path is not None
    _require_own_positions(config)
    architecture, path = config.backbone.config, config.backbone.path
    folder = resolve(path, "backbone.path")
    same = architecture is None or resolve(architecture, "backbone.config").resolve() == folder.resolve()
    require(same, "backbone.config", architecture, f"null or {path}, whose weights are loaded")
    return load_huggingface(folder)


# Methods that `Backbone` leaves to its subclasses.
METHODS = (
    "hidden",
    "next_hidden",
    "enable_activation_checkpointing",
    "enable_packing",
    "compile_steps",
    "generates_compiled",
    "new_cache",
    "reset_parameters",
)
# Hash of each plug-in's pre-trained weights in this process: an alignment keeps no more of a backbone than its rows.
_PLUGIN_SHA256: dict[str, str] = {}


def _from_plugin(config: ExperimentConfig, pretrained: bool) -> Backbone:
    path = config.backbone.path
    assert path is not None
    if config.backbone.config is not None:
        raise ValueError(f"backbone.config={config.backbone.config}: expected null, {path} has its own architecture")
    _require_own_positions(config, path)
    plugin = find_plugin(BACKBONE, path, [known.name for known in FORMATS])
    backbone: Any = plugin.function(plugin.argument, pretrained)
    if not isinstance(backbone, Backbone):
        made = type(backbone).__name__
        raise ValueError(f"{plugin.where}: {made} of {plugin.origin} is no t2i_lm.models.backbone.Backbone")
    plugin.require(backbone, ("sha256", "config", "tok_embeddings", "output"))
    missing = [name for name in METHODS if getattr(type(backbone), name) is getattr(Backbone, name)]
    if missing:
        raise ValueError(f"{plugin.where}: {type(backbone).__name__} of {plugin.origin} lacks {', '.join(missing)}")
    if pretrained:
        _PLUGIN_SHA256[path] = str(backbone.sha256)
    return backbone


# Tried in order.
FORMATS = (
    BackboneFormat(
        "plugin",
        lambda config: is_plugin(config.backbone.path),
        lambda config: _from_plugin(config, pretrained=False),
        lambda config: _from_plugin(config, pretrained=True),
    ),
    BackboneFormat(
        "transformers",
        lambda config: huggingface_folder(config) is not None,
        _empty_huggingface,
        _pretrained_huggingface,
    ),
    BackboneFormat("open_lm", lambda config: True, _empty_open_lm, _pretrained_open_lm),
)


def _format(config: ExperimentConfig) -> BackboneFormat:
    return next(known for known in FORMATS if known.recognizes(config))


def empty_backbone(config: ExperimentConfig) -> Backbone:
    """The unexpanded backbone with uninitialized weights.

    Raises:
        ValueError: if it has fewer positions than `data.length`, or a plug-in cannot be used.
    """
    return _with_positions(_format(config).empty(config), config)


def pretrained_backbone(config: ExperimentConfig) -> Backbone:
    """The weights at `backbone.path`.

    Raises:
        ValueError: if they cannot be read or do not fit, or a plug-in cannot be used.
    """
    return _with_positions(_format(config).pretrained(config), config)


def weights_hashes(config: ExperimentConfig) -> dict[str, str] | None:
    """Hashes by file of the weights that a built experiment started from or reads rows of; None where it uses none."""
    path = config.backbone.path
    if path is None or (config.init == "random" and not config.reads_rows):
        return None
    if is_plugin(path):
        return {path: _PLUGIN_SHA256[path]}
    folder = resolve(path, "backbone.path")
    base = base_folder(folder)
    below = {} if base is None else {f"base/{name}": value for name, value in weights_sha256(base).items()}
    return weights_sha256(folder) | below


def architecture_hashes(config: ExperimentConfig) -> dict[str, str]:
    """Hashes of the JSON files that state the architectures of backbone and image tokenizer, where there are any."""
    backbone = "backbone.path" if config.backbone.config is None else "backbone.config"
    hashes = {}
    for key in (backbone, "image_tokenizer.path"):
        path = config.value(key)
        if path is None or path in PRESETS or is_plugin(path):
            continue
        file = resolve(path, key)
        if file.is_dir() or path != config.backbone.config:
            file = (file if file.is_dir() else file.parent) / "config.json"
        if file.is_file():
            hashes[key.partition(".")[0]] = known_sha256(file)
    return hashes


def random_backbone(config: ExperimentConfig) -> Backbone:
    """All weights random, from the seed."""
    backbone = empty_backbone(config)
    backbone.reset_parameters(generator(config.seed, "decoder"))
    return backbone


def shuffled_backbone(config: ExperimentConfig) -> Backbone:
    """The pre-trained tensors, the entries of each permuted."""
    backbone = pretrained_backbone(config)
    shuffle_entries(backbone, generator(config.seed, "shuffle"))
    return backbone


def gaussian_backbone(config: ExperimentConfig) -> Backbone:
    """Normal entries of the mean and standard deviation of each pre-trained tensor."""
    backbone = pretrained_backbone(config)
    draw_entries(backbone, generator(config.seed, "gaussian"))
    return backbone


def mimetic_backbone(config: ExperimentConfig) -> Backbone:
    """As `gaussian_backbone`, with the similarities of the attention matrices of each pre-trained head.

    Raises:
        ValueError: if the backbone is not open_lm's.
    """
    backbone = pretrained_backbone(config)
    require(isinstance(backbone, Decoder), "init", config.init, f"another with {config.backbone.path}: only open_lm's")
    draw_mimetic(backbone, generator(config.seed, "gaussian"))
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
    "gaussian": gaussian_backbone,
    "mimetic": mimetic_backbone,
    "body_only": body_only_backbone,
    "embeddings_only": embeddings_only_backbone,
    "aligned": pretrained_backbone,
}


def build_backbone(config: ExperimentConfig) -> Backbone:
    """The unexpanded backbone with the weights of `init`.

    Raises:
        ValueError: if weights cannot be read or do not fit.
    """
    return INITIALIZATIONS[config.init](config)


def _with_positions(backbone: Backbone, config: ExperimentConfig) -> Backbone:
    if config.data.length > backbone.config.seq_len:
        raise ValueError(f"data.length={config.data.length}: the backbone has {backbone.config.seq_len} positions")
    return backbone


def with_experts(decoder: Backbone, config: ExperimentConfig, vocab: JointVocab) -> Backbone:
    """The expanded decoder, or with `modality_experts` the one that takes over its tensors.

    Raises:
        ValueError: if the backbone cannot have modality experts.
    """
    return add_modality_experts(decoder, vocab.special(IMAGE_START)) if config.modality_experts else decoder


def choose_trained(decoder: Backbone, config: ExperimentConfig, vocab: JointVocab | None = None) -> None:
    """Freezes all parameters outside `tune` or in `freeze`, and rows without a loss; adds adapters.

    Before a strategy wraps the decoder.

    `vocab` is that of an expanded decoder.
    """
    tune_only(decoder, config.tune)
    if config.freeze:
        freeze(decoder, config.freeze)
    if config.lora.rank:
        add_adapters(decoder, config.lora.rank, config.lora.alpha, generator(config.seed, "adapters"))
        if config.lora.image_only:
            assert vocab is not None
            restrict_adapters(decoder, vocab.special(IMAGE_START))
    if config.loss_rows == "image" and not decoder.config.weight_tying:
        # Unused, and DDP would wait for their gradients.
        for rows in (decoder.output.text, decoder.output.bias, decoder.output.special):
            if rows is not None:
                rows.requires_grad_(False)


def prepare_blocks(decoder: Backbone, config: ExperimentConfig) -> None:
    """Turns on packing, float8, activation checkpointing and compilation; before a strategy wraps the decoder.

    Raises:
        ValueError: if the backbone cannot be packed or has no layers for float8.
    """
    if config.trainer.packing:
        decoder.enable_packing()
    if config.trainer.fp8:
        float8_layers(decoder)
    if config.trainer.activation_checkpointing:
        decoder.enable_activation_checkpointing()
    if config.trainer.compile and can_compile("trainer.compile"):
        how = {"max_autotune_gemm": True} if config.trainer.autotune else None
        for block in blocks_of(decoder):
            block.compile(options=how)

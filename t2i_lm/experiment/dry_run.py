"""What a run would be, without data, weights or training: `python -m t2i_lm.train ... --dry-run`.

The model is built on the meta device, so the paper's 1.5B parameters take seconds and no memory. Where files are
absent, their sizes come from the config: the backbone's preset, and `image_tokenizer.model` for the image ids.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn

from t2i_lm.assets import find
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import OPENED_BY_PATH, is_plugin
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.factory import choose_trained, empty_backbone
from t2i_lm.models.flops import PEAKS, flop_per_token, formula
from t2i_lm.models.freeze import group_table, overlaps
from t2i_lm.runtime.devices import precision
from t2i_lm.runtime.plugins import plugin_identities
from t2i_lm.storage import hub
from t2i_lm.tokenizers.image import open_image_tokenizer
from t2i_lm.tokenizers.layout import ImageLayout, Layout
from t2i_lm.tokenizers.vq import PatchedVQ

# GPUs that hours are stated for, and an assumed price in dollars an hour.
GPUS = {"A100": 2.0, "H100": 3.0}
# Model FLOP utilisation that hours are stated at. open_lm's own code reached 0.28 to 0.34 on A100s.
MFU = 0.4
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A model on the meta device and its size before the vocabulary grew."""

    model: nn.Module
    layout: Layout | ImageLayout | None
    before: int


def plan(config: ExperimentConfig) -> Plan:
    """Builds what the experiment trains on the meta device.

    Raises:
        ValueError: if the config does not say what would be trained.
    """
    with torch.device("meta"):
        if config.task == "image_tokenizer":
            tokenizer = PatchedVQ(config.image_tokenizer.model)
            return Plan(tokenizer, None, count(tokenizer))
        decoder = empty_backbone(config)
    before = count(decoder)
    layout: Layout | ImageLayout | None = None
    if config.task == "align":
        return Plan(_rows_to_align(decoder, image_ids(config)[0]), None, before)
    if config.task in ("text_to_image", "unconditional"):
        codes, grid = image_ids(config)
        vocab = expand_vocabulary(decoder, codes, torch.Generator())
        unconditional = config.task == "unconditional"
        image_tokens = grid[0] * grid[1]
        layout = ImageLayout(vocab, image_tokens) if unconditional else Layout(vocab, image_tokens, config.data.length)
    choose_trained(decoder, config)
    return Plan(decoder, layout, before)


def _rows_to_align(decoder: Backbone, codes: int) -> nn.Module:
    """The embedding's frozen text rows and its image rows."""
    expand_vocabulary(decoder, codes, torch.Generator())
    decoder.tok_embeddings.special = None
    decoder.tok_embeddings.text.requires_grad_(False)
    return decoder.tok_embeddings


def image_ids(config: ExperimentConfig) -> tuple[int, tuple[int, int]]:
    """Codes of the image tokenizer and the grid of an image's ids; from the config where there is no file."""
    settings = config.image_tokenizer
    path = settings.path if settings.path is None or is_plugin(settings.path) else find(settings.path)
    if path is not None:
        image = open_image_tokenizer(path, settings.size, settings.expect)
        return image.vocab_size, image.grid
    side = settings.size // (settings.model.patch * 2 ** (len(settings.model.block_out_channels) - 1))
    return settings.model.codes, (side, side)


def describe(config: ExperimentConfig) -> str:
    """The resolved config, parameters by group, tokens, compute, memory and hours, as text."""
    planned = plan(config)
    lines = [OmegaConf.to_yaml(OmegaConf.structured(config)).rstrip(), "---"]
    lines += [f"missing: {missing}" for missing in absent_files(config)]
    lines += [f"plug-in: {key} of {identity}" for key, identity in plugin_identities(config).items()]
    lines.append(f"precision here: {precision(config)}")
    total, trainable = count(planned.model), count(planned.model, trainable=True)
    if not isinstance(planned.model, Backbone):
        return "\n".join([*lines, f"parameters: {total:,}, {trainable:,} trainable"])
    grown = f" ({planned.before:,} before expansion)" if total != planned.before else ""
    lines.append(f"parameters: {total:,}{grown}, {trainable:,} trainable")
    lines += ["", group_table(planned.model), *overlaps(planned.model, config.freeze), ""]
    if planned.layout is not None:
        vocab, layout = planned.layout.vocab, planned.layout
        budget = f" and at most {layout.text_budget:,} text ids" if isinstance(layout, Layout) else ""
        lines.append(
            f"vocabulary: {vocab.size:,} rows ({vocab.text_size:,} text, {vocab.image_size:,} image); a sequence has "
            f"{layout.image_tokens:,} image ids{budget}"
        )
    length = planned.layout.length if planned.layout is not None else config.data.length
    return "\n".join([*lines, *cost(config, planned.model, length)])


def cost(config: ExperimentConfig, decoder: Backbone, length: int) -> list[str]:
    """Tokens, compute, memory a GPU and GPU-hours of sequences of `length` positions."""
    trainer = config.trainer
    tokens = config.data.batch_size * length
    flops = flop_per_token(decoder, length)
    in_all = flops * tokens * trainer.max_steps
    lines = [
        f"tokens a step: {tokens:,} (pads included); in {trainer.max_steps:,} steps: "
        f"{tokens * trainer.max_steps:.4g} tokens",
        f"{formula(decoder, length, None)}; {in_all:.3g} in all (frozen parts counted as if trained)",
        f"memory a process at {config.micro_batch} sequences, an estimate: "
        + ", ".join(f"{name} {gib:.1f} GiB" for name, gib in memory_gib(config, decoder, length).items()),
    ]
    processes = trainer.devices * trainer.num_nodes
    for name, dollars in GPUS.items():
        peak = PEAKS[name]
        hours = in_all / (MFU * peak) / 3600
        lines.append(
            f"{name} at {MFU:.0%} of {peak / 1e12:.0f} TFLOP/s: {hours:,.4g} GPU-hours, {hours / processes:,.3g} h on "
            f"{processes}; {hours * dollars:,.0f} dollars at an assumed {dollars:g} an hour"
        )
    return lines


def memory_gib(config: ExperimentConfig, decoder: Backbone, length: int) -> dict[str, float]:
    """Estimate by strategy: float32 weights, gradients and moments, bfloat16 activations, one gathered part."""
    model, trainer = decoder.config, config.trainer
    tokens = config.micro_batch * length
    trained = count(decoder, trainable=True)
    accumulates = trainer.accumulate_grad_batches > 1
    states = 4 * count(decoder) + 12 * trained
    # A block keeps its inputs, normed inputs, queries, keys, values, gates and values for the backward pass.
    block = tokens * (14 * model.hidden_dim + 6 * 8 * model.hidden_dim / 3)
    kept = block + 2 * tokens * model.hidden_dim * model.n_layers
    activations = kept if trainer.activation_checkpointing else block * model.n_layers
    # While a sharded part is used it is whole: the largest is the output matrix or a block.
    rows = decoder.output.matrix().numel()
    gathered = 8 * max(rows, (count(decoder) - rows - decoder.tok_embeddings.matrix().numel()) // model.n_layers)
    # Gradients that wait for the last micro-batch of a step are whole, too.
    whole = gathered + (4 * trained if accumulates else 0)
    shares = {"ddp": 1, "hsdp": trainer.devices, "fsdp2": trainer.devices * trainer.num_nodes}
    return {name: (states / share + activations + (whole if share > 1 else 0)) / GIB for name, share in shares.items()}


def absent_files(config: ExperimentConfig) -> list[str]:
    """Keys that a real run needs and that name nothing that is here."""
    images = ("backbone", "text_tokenizer", "image_tokenizer")
    lines = []
    for section in () if config.task in ("text", "image_tokenizer") else images:
        path = getattr(config, section).path
        if path is None or (not is_plugin(path) and find(path) is None):
            fetch = f" (a run fetches it; or: {hub.parse(path).command})" if path and hub.is_hub(path) else ""
            lines.append(f"{section}.path={path or 'null'}{fetch}")
    data = config.data
    local = data.source in OPENED_BY_PATH
    reads_path = data.source != "scenes" and not is_plugin(data.source)
    if reads_path and (data.path is None or (local and not Path(data.path).exists())):
        lines.append(f"data.path={data.path or 'null'}")
    return lines


def count(model: nn.Module, trainable: bool = False) -> int:
    """Parameters, all or those that learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trainable)

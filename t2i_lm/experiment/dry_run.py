"""Parameters, tokens, memory and cost of a run, without its data or weights: `python -m t2i_lm.train ... --dry-run`.

The model is built on the meta device, so the paper's 1.5B parameters take seconds and no memory. Sizes of absent files
come from the config: the backbone's preset, and `image_tokenizer.model` for the image ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from t2i_lm.assets import find
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import to_yaml
from t2i_lm.config.sections import is_plugin
from t2i_lm.experiment.own_tokenizer import require_tokenizer_at_hand
from t2i_lm.experiment.required_files import absent_files, to_fetch
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.factory import choose_trained, empty_backbone, with_experts
from t2i_lm.models.flops import PEAKS, flop_per_token, formula
from t2i_lm.models.freeze import group_table, overlaps
from t2i_lm.modules.caption_term import CaptionTerm
from t2i_lm.runtime.devices import precision, require_device
from t2i_lm.runtime.plugins import plugin_identities
from t2i_lm.runtime.tables import compact
from t2i_lm.storage.reading import reading
from t2i_lm.tokenizers.image import open_image_tokenizer
from t2i_lm.tokenizers.joint_vocab import JointVocab
from t2i_lm.tokenizers.layout import ImageLayout, Layout
from t2i_lm.tokenizers.text import open_text_tokenizer
from t2i_lm.tokenizers.vq import PatchedVQ
from t2i_lm.tokenizers.words import WordVQ

# GPUs of the cost estimate, with an assumed price in dollars per hour.
GPUS = {"A100": 2.0, "H100": 3.0}
# Assumed model FLOP utilization. open_lm's own code reached 0.28 to 0.34 on A100s.
MFU = 0.4
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A model on the meta device.

    Attributes:
        model: the module to train.
        layout: of its sequences; None without image tokens in sequences.
        unexpanded: parameters before the vocabulary expansion.
    """

    model: nn.Module
    layout: Layout | ImageLayout | None
    unexpanded: int


def plan(config: ExperimentConfig) -> Plan:
    """Builds the model of an experiment on the meta device.

    Raises:
        ValueError: if the config does not determine its architecture.
    """
    with torch.device("meta"):
        if config.task == "image_tokenizer":
            tokenizer = _tokenizer_to_train(config)
            return Plan(tokenizer, None, parameter_count(tokenizer))
        key = "backbone.path" if config.backbone.config is None else "backbone.config"
        with reading(key, str(config.value(key))):
            decoder = empty_backbone(config)
    unexpanded = parameter_count(decoder)
    layout: Layout | ImageLayout | None = None
    if config.task == "align":
        return Plan(_rows_to_align(decoder, image_ids(config)[0]), None, unexpanded)
    vocab: JointVocab | None = None
    if config.task in ("text_to_image", "unconditional"):
        codes, grid = image_ids(config)
        vocab = expand_vocabulary(decoder, codes, torch.Generator())
        decoder = with_experts(decoder, config, vocab)
        unconditional = config.task == "unconditional"
        image_tokens = grid[0] * grid[1]
        layout = ImageLayout(vocab, image_tokens) if unconditional else Layout(vocab, image_tokens, config.data.length)
    choose_trained(decoder, config, vocab)
    return Plan(decoder, layout, unexpanded)


def _tokenizer_to_train(config: ExperimentConfig) -> nn.Module:
    """The image tokenizer, with what trains it by the rows of a language model."""
    settings = config.image_tokenizer
    if not config.reads_rows:
        return PatchedVQ(settings.model)
    with reading("backbone.path", str(config.backbone.path)):
        rows_VD = empty_backbone(config).tok_embeddings.text.detach()
    model = PatchedVQ(settings.model)
    if settings.words is not None:
        codes = settings.model.codes
        model = WordVQ(settings.model, [""] * codes, rows_VD.new_empty(codes, rows_VD.shape[1]))
    parts: list[nn.Module] = [model]
    if settings.caption_weight:
        parts.append(CaptionTerm(rows_VD, rows_VD[0], settings.model.code_dim, config.align))
    return nn.ModuleList(parts)


def _rows_to_align(decoder: Backbone, codes: int) -> nn.Module:
    """The embedding with frozen text rows and trainable image rows."""
    expand_vocabulary(decoder, codes, torch.Generator())
    decoder.tok_embeddings.special = None
    decoder.tok_embeddings.text.requires_grad_(False)
    return decoder.tok_embeddings


def image_ids(config: ExperimentConfig) -> tuple[int, tuple[int, int]]:
    """Number of codes of the image tokenizer, and its grid; from the config if the file is absent."""
    settings = config.image_tokenizer
    path = settings.path if settings.path is None or is_plugin(settings.path) else find(settings.path)
    if path is not None:
        image = open_image_tokenizer(path, settings.size, settings.expect, settings.pixel_range)
        return image.vocab_size, image.grid
    side = settings.size // settings.model.cell
    return settings.model.codes, (side, side)


def describe(config: ExperimentConfig) -> str:
    """The resolved config, parameters by group, tokens, compute, memory and hours, as text."""
    planned = plan(config)
    lines = [to_yaml(config).rstrip(), "---"]
    absent = absent_files(config)
    fetched = {key: f" (a run fetches it; or: {command})" for key, command in to_fetch(absent).items()}
    lines += [f"missing: {key}={path}{fetched.get(key, '')}" for key, path in absent.items()]
    lines += [f"plug-in: {key} of {identity}" for key, identity in plugin_identities(config).items()]
    lines += config.notes
    for reason in refusals(config):
        if reason.partition("=")[0] not in absent:
            lines.append(f"a run is refused here: {reason}")
    lines.append(f"precision here: {precision(config)}")
    total, trainable = parameter_count(planned.model), parameter_count(planned.model, trainable=True)
    if not isinstance(planned.model, Backbone):
        return "\n".join([*lines, f"parameters: {total:,}, {trainable:,} trainable"])
    before = f" ({planned.unexpanded:,} before expansion)" if total != planned.unexpanded else ""
    lines.append(f"parameters: {total:,}{before}, {trainable:,} trainable")
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


def refusals(config: ExperimentConfig) -> Iterator[str]:
    """Why a run would end on this machine before its data is prepared."""
    checks = (config.require_paths, partial(require_device, config.trainer), partial(_require_own_tokenizer, config))
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)


def _require_own_tokenizer(config: ExperimentConfig) -> None:
    """Checks the text tokenizer, where a run has one and it is on this machine."""
    settings = config.text_tokenizer
    if config.task == "text" and settings.path is None:
        require_tokenizer_at_hand(config, None)
    used = settings.path is not None and (config.task != "image_tokenizer" or config.reads_rows)
    if used and not is_plugin(str(settings.path)) and find(str(settings.path)) is not None:
        text = open_text_tokenizer(str(settings.path), settings.document_start, settings.document_end)
        require_tokenizer_at_hand(config, text)


def cost(config: ExperimentConfig, decoder: Backbone, length: int) -> list[str]:
    """Tokens, compute, memory per process and GPU-hours, for sequences of `length` positions."""
    trainer = config.trainer
    tokens = config.data.batch_size * length
    flop = flop_per_token(decoder, length) * tokens * trainer.max_steps
    memory = ", ".join(f"{name} {gib:.1f} GiB" for name, gib in memory_gib(config, decoder, length).items())
    lines = [
        f"tokens: {compact(tokens, 4)} per step (pads included), {compact(tokens * trainer.max_steps, 4)} in "
        f"{trainer.max_steps:,} steps",
        f"{formula(decoder, length, None)}; {flop:.3g} in total (frozen parameters counted as trained)",
        f"memory per process, estimate for {config.micro_batch:,} sequences: {memory}",
    ]
    processes = trainer.processes
    for name, dollars in GPUS.items():
        hours = flop / (MFU * PEAKS[name]) / 3600
        lines.append(
            f"{name} at {MFU:.0%} MFU ({PEAKS[name] / 1e12:.0f} TFLOP/s peak): {hours:,.0f} GPU-hours, "
            f"{hours / processes:,.1f} h on {processes:,} GPUs; "
            f"${hours * dollars:,.0f} at an assumed ${dollars:g} per hour"
        )
    return lines


def memory_gib(config: ExperimentConfig, decoder: Backbone, length: int) -> dict[str, float]:
    """Estimate by strategy: float32 weights, gradients and moments, bfloat16 activations, one gathered shard."""
    model, trainer = decoder.config, config.trainer
    tokens = config.micro_batch * length
    total, trainable = parameter_count(decoder), parameter_count(decoder, trainable=True)
    gradients = 1
    if config.optim.gradient_projection:  # the second loss's, and while it is added to or reduced another one
        gradients += 2 if trainer.accumulate_grad_batches * trainer.processes > 1 else 1
    states = 4 * total + (8 + 4 * gradients) * trainable
    # The backward pass needs a block's input, norms, queries, keys, values and feed-forward activations.
    block = tokens * (14 * model.hidden_dim + 6 * 8 * model.hidden_dim / 3)
    checkpointed = block + 2 * tokens * model.hidden_dim * model.n_layers
    activations = checkpointed if trainer.activation_checkpointing else block * model.n_layers
    # A shard is gathered while it is used: at most the output matrix or a block.
    rows = decoder.output.matrix().numel()
    gathered = 8 * max(rows, (total - rows - decoder.tok_embeddings.matrix().numel()) // model.n_layers)
    # Gradients are unsharded until the last micro-batch of a step.
    unsharded = gathered + (4 * trainable if trainer.accumulate_grad_batches > 1 else 0)
    shards = {"ddp": 1, "hsdp": trainer.devices, "fsdp2": trainer.processes}
    return {
        name: (states / number + activations + (unsharded if number > 1 else 0)) / GIB
        for name, number in shards.items()
    }


def parameter_count(model: nn.Module, trainable: bool = False) -> int:
    """Number of parameters, all or only the trainable ones."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trainable)

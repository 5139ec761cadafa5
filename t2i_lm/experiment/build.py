"""From an ExperimentConfig to its module, tokenizers and data."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from t2i_lm.assets import resolve
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import is_plugin
from t2i_lm.data.alignment import BagDataModule
from t2i_lm.data.captioned_images import CaptionedImageDataModule
from t2i_lm.data.code_words import code_words, first_captions
from t2i_lm.data.datamodules import BatchDataModule, PairDataModule, TextDataModule
from t2i_lm.data.images import ImageDataModule
from t2i_lm.data.replay import ReplayDataModule, prepare_replay
from t2i_lm.data.shards.cache import former_scenes
from t2i_lm.data.shards.format import read_index
from t2i_lm.data.shards.prepare import prepare_pairs, prepare_text
from t2i_lm.data.shards.streamed import training_shards
from t2i_lm.experiment.own_tokenizer import require_tokenizer, require_tokenizer_at_hand
from t2i_lm.models.aligned_rows import read_aligned_rows
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.expand import ImageRowSource, expand_vocabulary
from t2i_lm.models.factory import (
    build_backbone,
    choose_trained,
    prepare_blocks,
    pretrained_backbone,
    with_experts,
)
from t2i_lm.modules.alignment import AlignmentModule
from t2i_lm.modules.base import DecoderModule
from t2i_lm.modules.caption_term import CaptionTerm
from t2i_lm.modules.distillation import DistilledModule
from t2i_lm.modules.gradient_projection import ProjectedDistilledModule, ProjectedModule
from t2i_lm.modules.image_tokenizer import ImageTokenizerModule
from t2i_lm.modules.text import TextModule
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.modules.unconditional import UnconditionalImageModule
from t2i_lm.runtime.devices import uses_gpu
from t2i_lm.runtime.launch import global_rank, local_rank
from t2i_lm.runtime.seeds import generator, seeded
from t2i_lm.storage.reading import reading
from t2i_lm.tokenizers.base import ImageTokenizer, TextTokenizer
from t2i_lm.tokenizers.documents import context_id, describe_documents
from t2i_lm.tokenizers.image import describe_pixels, open_image_tokenizer
from t2i_lm.tokenizers.joint_vocab import JointVocab
from t2i_lm.tokenizers.layout import ImageLayout, Layout
from t2i_lm.tokenizers.text import open_text_tokenizer
from t2i_lm.tokenizers.vq import PatchedVQ
from t2i_lm.tokenizers.words import WordVQ, phrase_rows, pieces_of, standardized

Environment = Mapping[str, Any]


@dataclass(kw_only=True)
class ImageModel:
    """An expanded decoder with its tokenizers and sequence layout."""

    config: ExperimentConfig
    module: DecoderModule
    text: TextTokenizer
    image: ImageTokenizer
    layout: Layout | ImageLayout

    @property
    def decoder(self) -> Backbone:
        """The expanded language model."""
        return self.module.decoder


@dataclass(kw_only=True)
class Experiment:
    """A module and its data.

    Attributes:
        config: the experiment's keys.
        module: the module to train.
        data: its training and validation data.
        index: index of the token shards (`data.shards.format`); empty if images are read directly.
        replay_hash: data hash of the shards of replayed text; None without replay.
    """

    config: ExperimentConfig
    module: pl.LightningModule
    data: BatchDataModule
    index: dict[str, Any] = field(default_factory=dict)
    replay_hash: str | None = None


@dataclass(kw_only=True)
class ImageExperiment(ImageModel, Experiment):
    """Text-to-image or unconditional: an image model on token shards."""

    module: DecoderModule
    shards: Path


@dataclass(kw_only=True)
class AlignmentExperiment(Experiment):
    """Alignment of image rows with text rows, on token shards."""

    module: AlignmentModule
    text: TextTokenizer
    image: ImageTokenizer
    shards: Path


@dataclass(kw_only=True)
class TextExperiment(Experiment):
    """A decoder on shards of plain text."""

    module: TextModule
    text: TextTokenizer
    shards: Path


@dataclass(kw_only=True)
class ImageTokenizerExperiment(Experiment):
    """An image tokenizer on images.

    Attributes:
        text: the tokenizer of the language model whose text rows the codes are trained by; None without one.
    """

    module: ImageTokenizerModule
    text: TextTokenizer | None = None


def open_text(config: ExperimentConfig) -> TextTokenizer:
    """The text tokenizer at `text_tokenizer.path`."""
    settings = config.text_tokenizer
    assert settings.path is not None
    return open_text_tokenizer(settings.path, settings.document_start, settings.document_end)


def open_image(config: ExperimentConfig, rank: int = 0) -> ImageTokenizer:
    """The image tokenizer at `image_tokenizer.path`, on GPU number `rank` if the run uses GPUs.

    Raises:
        ValueError: if samples are to be generated and the tokenizer has no decoder.
    """
    settings = config.image_tokenizer
    assert settings.path is not None
    image = open_image_tokenizer(settings.path, settings.size, settings.expect, settings.pixel_range)
    if uses_gpu(config.trainer.accelerator):
        image.to(torch.device("cuda", rank))
    if config.samples.prompts and not image.decodes:
        raise ValueError(
            f"samples.prompts={config.samples.prompts}: image_tokenizer.path has no decoder; set samples.prompts=0"
        )
    return image


def prepare(config: ExperimentConfig, rank: int = 0) -> Path:
    """Writes the experiment's token shards where they are absent, and returns their folder.

    Raises:
        ValueError: if the text tokenizer does not fit a backbone that is on this machine, or as `prepare_pairs` and
            `prepare_text` do.
    """
    text = None if config.text_tokenizer.path is None else open_text(config)
    require_tokenizer_at_hand(config, text)
    if config.task == "text":
        return prepare_text(config)[0]
    assert text is not None
    return prepare_pairs(config, text, open_image(config, rank))


def open_backbone(config: ExperimentConfig) -> Backbone:
    """The unexpanded backbone with the weights of `init`; a note on stderr says where it is an exported image model.

    Raises:
        ValueError: if weights cannot be read or do not fit.
    """
    path = config.backbone.path
    if path is not None and not is_plugin(path) and config.init != "random":
        _note_exported(resolve(path, "backbone.path"))
    key = "backbone.config" if path is None else "backbone.path"
    with reading(key, str(config.value(key))):
        return build_backbone(config)


def _note_exported(path: Path) -> None:
    """Prints a line if a backbone is the export of an image model."""
    card = (path if path.is_dir() else path.parent) / "card.json"
    if not card.is_file():
        return
    with reading("backbone.path", card):
        exported = dict(json.loads(card.read_text(encoding="utf-8")))
    if "image_offset" in exported and global_rank() == 0:
        text, start, rows = (int(exported[name]) for name in ("text_rows", "image_offset", "rows"))
        print(
            f"note: backbone.path={path} was exported from a run of task={exported.get('task')}: beside its {text:,} "
            f"text rows, {start - text} special and {rows - start:,} image rows count as text rows of the new model. "
            "A language model has none: give the backbone of that run, or --resume to train it further",
            file=sys.stderr,
        )


def build_expanded(config: ExperimentConfig) -> tuple[Backbone, JointVocab, TextTokenizer, ImageTokenizer]:
    """The expanded decoder, its vocabulary and tokenizers.

    Raises:
        ValueError: if the text tokenizer does not fit the backbone, or the aligned rows do not fit the tokenizers.
    """
    text, image = open_text(config), open_image(config, local_rank())
    decoder = open_backbone(config)
    require_tokenizer(config, text, decoder.config.vocab_size)
    rows = config.image_rows
    with reading("aligned_rows", str(config.aligned_rows)):
        text_VD = decoder.tok_embeddings.text
        aligned = read_aligned_rows(config, text_VD, text.sha256, image.sha256) if rows == "aligned" else None
    pieces = words_of_codes(image, text, config) if rows == "words" else None
    source = ImageRowSource(image.codebook if rows == "codebook" else None, aligned, pieces)
    vocab = expand_vocabulary(decoder, image.vocab_size, generator(config.seed, "new rows"), rows, source)
    return with_experts(decoder, config, vocab), vocab, text, image


def words_of_codes(image: ImageTokenizer, text: TextTokenizer, config: ExperimentConfig) -> list[list[int]]:
    """Text ids of the words of each code of an image tokenizer.

    Raises:
        ValueError: if its codes have no words, or other than one text each.
    """
    words = getattr(image, "words", None)
    if words is None:
        raise ValueError(
            f"new_rows=words: the codes of image_tokenizer.path={config.image_tokenizer.path} have no words; expected "
            "a tokenizer trained with image_tokenizer.words, or the oracle of scenes"
        )
    if len(words) != image.vocab_size:
        raise ValueError(
            f"new_rows=words: image_tokenizer.path={config.image_tokenizer.path} has words for {len(words)} codes; "
            f"expected {image.vocab_size}, one for each (empty for a code without words)"
        )
    return [pieces_of(text, phrase) if phrase else [] for phrase in words]


def build_model(config: ExperimentConfig) -> ImageModel:
    """The expanded decoder as a text-to-image or an unconditional model, without data."""
    decoder, vocab, text, image = build_expanded(config)
    choose_trained(decoder, config, vocab)
    prepare_blocks(decoder, config)
    image_tokens = image.grid[0] * image.grid[1]
    if config.task == "unconditional":
        image_layout = ImageLayout(vocab, image_tokens)
        module: DecoderModule = UnconditionalImageModule(decoder, config, image_layout)
        return ImageModel(config=config, module=module, text=text, image=image, layout=image_layout)
    layout = Layout(vocab, image_tokens, config.data.length)
    projected = config.optim.gradient_projection
    if config.distil.weight:
        distilled = ProjectedDistilledModule if projected else DistilledModule
        module = distilled(decoder, config, layout, context_id(text))
    else:
        module = (ProjectedModule if projected else TextToImageModule)(decoder, config, layout)
    return ImageModel(config=config, module=module, text=text, image=image, layout=layout)


def build_images(config: ExperimentConfig, run: Environment | None) -> ImageExperiment:
    """An image model on caption-image pairs, or on their images alone."""
    model = build_model(config)
    shards = training_shards(config, model.text, model.image, run)
    model.image.to(torch.device("cpu"))  # frees GPU memory for training
    data, replay_hash = PairDataModule(config, shards, model.layout), None
    if config.data.replayed:
        assert isinstance(model.layout, Layout)
        replay = prepare_replay(config, model.text)
        data, replay_hash = ReplayDataModule(config, shards, model.layout, replay), _index(replay)["data_hash"]
    return ImageExperiment(**vars(model), data=data, index=_index(shards), shards=shards, replay_hash=replay_hash)


def build_alignment(config: ExperimentConfig, run: Environment | None) -> AlignmentExperiment:
    """The alignment of an expanded decoder's image rows with its text rows."""
    decoder, _, text, image = build_expanded(config)
    shards = training_shards(config, text, image, run)
    module, data = AlignmentModule(decoder.tok_embeddings, config), BagDataModule(config, shards)
    return AlignmentExperiment(
        config=config, module=module, data=data, index=_index(shards), shards=shards, text=text, image=image
    )


def build_text(config: ExperimentConfig, run: Environment | None) -> TextExperiment:
    """A decoder from random weights on plain text."""
    decoder = open_backbone(config)
    choose_trained(decoder, config)
    prepare_blocks(decoder, config)
    trained_here = config.text_tokenizer.path is None
    require_tokenizer(config, None if trained_here else open_text(config), decoder.config.vocab_size)
    shards, text = prepare_text(config)
    data = TextDataModule(config, shards)
    module = TextModule(decoder, config)
    return TextExperiment(config=config, module=module, data=data, index=_index(shards), shards=shards, text=text)


def build_image_tokenizer(config: ExperimentConfig, run: Environment | None) -> ImageTokenizerExperiment:
    """An image tokenizer from random weights on images."""
    former_scenes(config, None, run)
    settings = config.image_tokenizer
    if not settings.reads_rows:
        with seeded(config.seed):  # diffusers draws from the global stream
            model = PatchedVQ(settings.model)
        module = ImageTokenizerModule(model, config)
        return ImageTokenizerExperiment(config=config, module=module, data=ImageDataModule(config))
    text, rows_VD = open_text(config), _rows_of_words(config)
    require_tokenizer(config, text, len(rows_VD))
    with seeded(config.seed):
        if settings.words is None:
            model = PatchedVQ(settings.model)
        else:
            words = code_words(config, text)
            model = WordVQ(settings.model, words, phrase_rows(rows_VD, [pieces_of(text, word) for word in words]))
        captions = None
        if settings.caption_weight:
            mean_D = phrase_rows(rows_VD, text.encode_batch(list(first_captions(config)))).mean(dim=0)
            captions = CaptionTerm(rows_VD, mean_D, settings.model.code_dim, config.align)
    module = ImageTokenizerModule(model, config, captions)
    data = ImageDataModule(config) if captions is None else CaptionedImageDataModule(config, text)
    return ImageTokenizerExperiment(config=config, module=module, data=data, text=text)


def trained_image_tokenizer(
    config: ExperimentConfig, run: Environment, state: Mapping[str, torch.Tensor]
) -> ImageTokenizerExperiment:
    """An image tokenizer with the weights of a checkpoint, without what trains it by captions.

    The rows of its words are in the checkpoint, so that the language model is not required.

    Args:
        config: its experiment.
        run: its env.json.
        state: `state_dict` of the checkpoint.

    Raises:
        RuntimeError: if the state does not fit the config.
    """
    former_scenes(config, None, run)
    settings, rows_KD = config.image_tokenizer, state.get("model.rows_KD")
    with seeded(config.seed):
        if settings.words is None or rows_KD is None:
            model = PatchedVQ(settings.model)
        else:
            model = WordVQ(settings.model, [""] * settings.model.codes, rows_KD)
    module = ImageTokenizerModule(model, config)
    module.load_state_dict({name: value for name, value in state.items() if not name.startswith("captions.")})
    return ImageTokenizerExperiment(config=config, module=module, data=ImageDataModule(config))


def _rows_of_words(config: ExperimentConfig) -> torch.Tensor:
    """The pre-trained text rows (V, D), standardized."""
    with reading("backbone.path", str(config.backbone.path)):
        return standardized(pretrained_backbone(config).tok_embeddings.text)


def conventions(experiment: Experiment) -> list[str]:
    """One line on the ends of a document, and one on the pixel range, of the tokenizers that an experiment uses."""
    lines = []
    if isinstance(experiment, ImageExperiment | AlignmentExperiment | TextExperiment):
        lines.append(describe_documents(experiment.text))
    if isinstance(experiment, ImageExperiment | AlignmentExperiment):
        lines.append(describe_pixels(experiment.image))
    return lines


def _index(shards: Path) -> dict[str, Any]:
    return read_index(shards) or {}


# `task` -> builder of a config, and of env.json of the run that continues.
TASKS: dict[str, Callable[[ExperimentConfig, Environment | None], Experiment]] = {
    "text_to_image": build_images,
    "unconditional": build_images,
    "align": build_alignment,
    "text": build_text,
    "image_tokenizer": build_image_tokenizer,
}


def build(config: ExperimentConfig, run: Environment | None = None) -> Experiment:
    """Builds the model, whose errors appear in seconds, then prepares its token shards, which may take hours.

    Args:
        config: the experiment.
        run: env.json of the run that continues; None for a new one.

    Raises:
        ValueError: if its files cannot be used, or the run's data can no longer be made.
    """
    config.require_paths()
    pl.seed_everything(config.seed, verbose=False)
    return TASKS[config.task](config, run)

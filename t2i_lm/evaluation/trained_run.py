"""A trained run in Python: its config, curves, model, images and perplexity. `t2i_lm.load` returns it.

Shapes: `B` sequences, `T` positions, `N` image ids, `M` modalities.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from callbacks import split_entries
from callbacks.checkpoints import checkpoints, step_of
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_run
from t2i_lm.data.datamodules import pack_batch
from t2i_lm.data.pairs import RejectedPairError, center_crop, decode_image, rgb_of
from t2i_lm.data.shards.tokenize import encode_images
from t2i_lm.experiment.build import ImageModel
from t2i_lm.experiment.restore import load_trained
from t2i_lm.generation.images import (
    ImageArray,
    chosen_sampling,
    encode_captions,
    generate_images,
    require_fitting,
    seeds_of,
)
from t2i_lm.generation.prompts import require_words
from t2i_lm.models.backbone import Backbone
from t2i_lm.runtime.devices import precision
from t2i_lm.storage.run_folder import CHECKPOINTS, VAL, find_run, read_run
from t2i_lm.tokenizers.base import ImageTokenizer, TextTokenizer
from t2i_lm.tokenizers.layout import IntArray

HEAD = ("step", "samples", "tokens_nominal", "tokens_real", "lr")
VALUES = ("nll", "ppl", "nll_ema", "ppl_ema", "count")


class Tokenizers(NamedTuple):
    """Text <-> ids and images <-> ids of a run."""

    text: TextTokenizer
    image: ImageTokenizer


class TrainedRun:
    """A run folder with the newest checkpoint of its model, which is read at first use.

    `model`, `tokenizers`, `sample` and `perplexity` are of runs of task=text_to_image or unconditional and raise a
    ValueError for others; `sample` needs text_to_image.

    Attributes:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        run = read_run(self.folder)
        saved = checkpoints(self.folder / CHECKPOINTS)
        step = step_of(saved[-1]) if saved else run.metrics[-1]["step"] if run.metrics else 0
        state = "unfinished" if run.report is None else "finished"
        return f"TrainedRun({str(self.folder)!r}: {run.name}, step {step} of {self.config.trainer.max_steps}, {state})"

    @cached_property
    def config(self) -> ExperimentConfig:
        """The experiment that was run, all keys resolved; relative paths start where it was started."""
        return load_run(self.folder)

    @property
    def report(self) -> dict[str, Any] | None:
        """The run's report.json; None while the run is unfinished."""
        return read_run(self.folder).report

    def metrics(self) -> pd.DataFrame:
        """The curves of metrics.jsonl: one row per record and modality.

        Columns: `step`, `samples`, `tokens_nominal` (positions), `tokens_real` (without pads), `lr`; `split` (train,
        val, or val/NAME of each of several validation splits); `modality` (text, image, boundary, the aggregates all
        and all_no_boundary, ...); `nll` in nats/token and `ppl`, over the interval since the last record or the whole
        validation split; `nll_ema` and `ppl_ema` (train alone); `count` of targets. Missing values are NaN.

        Raises:
            ValueError: if the run's losses are not split by modality (task=image_tokenizer).
        """
        if self.config.task == "image_tokenizer":
            raise ValueError(f"{self.folder} is a run of task=image_tokenizer, whose metrics.jsonl has no modalities")
        rows = [
            {key: record[key] for key in HEAD} | {"split": split, "modality": modality} | entry
            for record in read_run(self.folder).metrics
            for split, entries in record.items()
            if split in ("train", VAL) or split.startswith(f"{VAL}/")
            for modality, entry in entries.items()
        ]
        return pd.DataFrame(rows, columns=[*HEAD, "split", "modality", *VALUES])

    @property
    def model(self) -> Backbone:
        """The expanded decoder, an `nn.Module` in evaluation mode; joint ids (B, T) -> logits (B, T, V)."""
        return self._trained.decoder

    @property
    def tokenizers(self) -> Tokenizers:
        """The tokenizers that the model was trained with."""
        return Tokenizers(self._trained.text, self._trained.image)

    def sample(
        self,
        prompts: str | Sequence[str],
        cfg: float | None = None,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        each: int = 1,
    ) -> list[Image.Image]:
        """Generates images, the same as `python -m t2i_lm.sample` for equal prompts and options.

        Args:
            prompts: captions.
            cfg: scale of classifier-free guidance; 1 is none, None the run's, as for the other sampling values.
            seed: of the first image; the others follow from it.
            temperature: divides the logits.
            top_k: number of most likely codes to sample from.
            top_p: total probability of the most likely codes to sample from.
            each: images per prompt.

        Returns:
            `each` images of the first prompt, then of the next.

        Raises:
            ValueError: if the run generates no images from captions, there is no prompt, a prompt is empty or too
                long, or a value is out of range.
        """
        if each < 1:
            raise ValueError(f"each={each}: expected at least 1")
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        if not listed:
            raise ValueError("prompts: expected at least one")
        require_words(listed)
        require_fitting(self._trained, listed)
        sampling = chosen_sampling(self._trained, temperature, top_k, top_p, cfg)
        captions = [prompt for prompt in listed for _ in range(each)]
        images_HW3 = generate_images(self._trained, captions, seeds_of(seed, len(captions)), sampling)
        return [Image.fromarray(image) for image in images_HW3]

    @torch.no_grad()
    def perplexity(self, pairs: Iterable[tuple[Image.Image | str | PathLike[str], str]]) -> dict[str, dict[str, float]]:
        """Loss of captioned images, split as in a validation of the run.

        Images are cropped and tokenized, captions cut to the sequence and batches formed as in training.

        Args:
            pairs: (image or its file, caption).

        Returns:
            For each modality with targets and the aggregates `all` and `all_no_boundary`: `nll` in nats/token, `ppl`,
            `nll_sum` and `count` of targets, as in metrics.jsonl.

        Raises:
            ValueError: if there are no pairs, or an image cannot be read.
        """
        model, size = self._trained, self.config.micro_batch
        texts, codes_BN = self._tokenize(pairs)
        device = model.decoder.output.text.device
        recorded = read_run(self.folder).environment.get("precision") or precision(self.config)
        nll_sum_M = torch.zeros(len(model.module.modalities), dtype=torch.float64)
        count_M = torch.zeros_like(nll_sum_M)
        with torch.autocast(device.type, torch.bfloat16, enabled=recorded == "bf16-mixed"):
            for start in range(0, len(texts), size):
                part = slice(start, start + size)
                batch = pack_batch(model.layout, texts[part], codes_BN[part], self.config.data.pad_to_multiple_of)
                _, nll_M, targets_M = model.module.sums(batch["ids_BT"].to(device))
                nll_sum_M, count_M = nll_sum_M + nll_M.cpu(), count_M + targets_M.cpu()
        total_S = torch.cat([nll_sum_M, count_M, torch.zeros_like(count_M)])
        entries = split_entries(model.module.modalities, total_S)
        return {name: entry for name, entry in entries.items() if entry["count"]}

    @cached_property
    def _trained(self) -> ImageModel:
        return load_trained(self.folder)

    def _tokenize(
        self, pairs: Iterable[tuple[Image.Image | str | PathLike[str], str]]
    ) -> tuple[list[IntArray], IntArray]:
        """Text ids of each caption, and image codes (B, N), encoded as many at once as for token shards."""
        text, image = self.tokenizers
        low_precision = self.config.image_tokenizer.precision == "bfloat16"
        texts: list[IntArray] = []

        def crops() -> Iterator[ImageArray]:
            for image_or_file, caption in pairs:
                texts.append(np.array(encode_captions(text, [caption])[0], dtype=np.int64))
                yield center_crop(_rgb(image_or_file), image.image_size)

        codes_BN = encode_images(image, crops(), low_precision)
        if not texts:
            raise ValueError("pairs: expected at least one (image, caption)")
        return texts, codes_BN


def open_run(path: str | PathLike[str]) -> TrainedRun:
    """A run folder, or the newest run in a folder of runs.

    Raises:
        ValueError: if there is none, listing the folder's contents.
    """
    folder = Path(path)
    if folder.is_dir():
        try:
            return TrainedRun(find_run(folder))
        except ValueError as error:
            raise ValueError(f"{error}; it holds {_contents(folder)}") from None
    parent = next(parent for parent in folder.absolute().parents if parent.is_dir())
    raise ValueError(f"{folder}: no such folder; {parent} holds {_contents(parent)}")


def _contents(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:20]) or "nothing"


def _rgb(image_or_file: Image.Image | str | PathLike[str]) -> Image.Image:
    try:
        if isinstance(image_or_file, Image.Image):
            return rgb_of(image_or_file, "an image")
        return decode_image(image_or_file, str(image_or_file))
    except RejectedPairError as reject:
        raise ValueError(f"pairs: {reject}") from reject

"""The images behind rows of prepared token shards, read again from their source, and what Figure 1 shows of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.pairs import cropped_images
from t2i_lm.data.scenes.scene import render, scene_of
from t2i_lm.data.shards.parts import open_split
from t2i_lm.data.shards.prepare import cut
from t2i_lm.data.shards.streamed import images_of, is_streamed
from t2i_lm.data.sources import open_source
from t2i_lm.experiment.build import ImageExperiment
from t2i_lm.generation.images import ImageArray, decode
from t2i_lm.storage.writing import atomic_file

# Samples of a source that are read in search of an image, per image.
SEARCH = 20
# Images of Figure 1.
TOKENIZED = 2


def originals(config: ExperimentConfig, split: str, rows: Mapping[str, Sequence[Any]], size: int) -> list[ImageArray]:
    """The images (H, W, 3) uint8 of the first rows of a split, as the image tokenizer saw them.

    Args:
        config: the experiment.
        split: name of the split.
        rows: columns `id` and, of scenes, `meaning` of the rows.
        size: side of the images in pixels.

    Raises:
        ValueError: if the source cannot be read or no longer has an image.
    """
    if config.data.source == "scenes":
        return [np.asarray(render(scene_of(json.loads(str(text))), size)) for text in rows["meaning"]]
    wanted = list(rows["id"])
    found: dict[str, ImageArray] = {}
    for name, image in _candidates(config, split, size, wanted):
        if name in wanted:
            found.setdefault(name, image)
        if len(found) == len(set(wanted)):
            return [found[name] for name in wanted]
    missing = next(name for name in wanted if name not in found)
    raise ValueError(f"data.path={config.data.path}: the original of {missing} is not among its first images")


def _candidates(
    config: ExperimentConfig, split: str, size: int, wanted: Sequence[str]
) -> Iterator[tuple[str, ImageArray]]:
    if config.data.source == "hub_stream" and is_streamed(wanted[0]):
        return cropped_images(images_of(config, wanted), size)
    parts, _ = cut(open_source(config.data, split, size), None, config.data.part_size)
    return islice(cropped_images((read for part in parts for read in part()), size), SEARCH * len(wanted))


def write_tokens(experiment: ImageExperiment, split: str, file: Path) -> None:
    """Writes the first images of a split with their ids, reconstructions and captions, and the rows of the vocabulary.

    Raises:
        ValueError: as `originals` does.
    """
    rows = open_split(experiment.shards, split)[:TOKENIZED]
    ids_BN = np.stack(rows["image_ids"]).astype(np.int64)
    vocab = experiment.layout.vocab
    width = experiment.decoder.tok_embeddings.text.shape[1]
    file.parent.mkdir(exist_ok=True)
    with atomic_file(file) as own:
        np.savez_compressed(
            own,
            originals=np.stack(originals(experiment.config, split, rows, experiment.image.image_size)),
            ids=ids_BN.reshape(-1, *experiment.image.grid),
            reconstructions=np.stack(decode(experiment, torch.from_numpy(ids_BN))),
            captions=np.array([experiment.text.decode(texts[0]) for texts in rows["text_ids"]]),
            rows=np.array([vocab.text_size, vocab.image_size, width]),
        )

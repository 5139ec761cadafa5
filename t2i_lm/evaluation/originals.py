"""The images behind rows of prepared token shards, read again from their source."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.pairs import RejectedPairError, center_crop
from t2i_lm.data.scenes.scene import render, scene_from_meaning
from t2i_lm.data.shards.prepare import cut
from t2i_lm.data.sources import open_source
from t2i_lm.generation.images import ImageArray

# Samples of a source that are read in search of an image, per image.
SEARCH = 20


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
        meanings = (json.loads(str(text)) for text in rows["meaning"])
        scenes = ({key: value for key, value in meaning.items() if key != "style"} for meaning in meanings)
        return [np.asarray(render(scene_from_meaning(scene), size)) for scene in scenes]
    wanted = list(rows["id"])
    found: dict[str, ImageArray] = {}
    for name, image in islice(_images(config, split, size), SEARCH * len(wanted)):
        if name in wanted:
            found.setdefault(name, image)
        if len(found) == len(set(wanted)):
            return [found[name] for name in wanted]
    missing = next(name for name in wanted if name not in found)
    raise ValueError(f"data.path={config.data.path}: the original of {missing} is not among its first images")


def _images(config: ExperimentConfig, split: str, size: int) -> Iterator[tuple[str, ImageArray]]:
    parts, _ = cut(open_source(config.data, split, size), None, config.data.part_size)
    for part in parts:
        for read in part():
            try:
                pair = read()
                yield pair.id, np.asarray(center_crop(pair.image, size))
            except RejectedPairError:
                continue

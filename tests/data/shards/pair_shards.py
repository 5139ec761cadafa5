"""Small shards of caption-image pairs in several parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from t2i_lm.data.shards.format import pair_features, part_folder, read_part, write_index, write_part
from t2i_lm.data.shards.held_out import RECURRING
from t2i_lm.tokenizers.joint_vocab import JointVocab
from t2i_lm.tokenizers.layout import Layout

LAYOUT = Layout(JointVocab(1000, 256), image_tokens=4, length=24)
TOKENIZERS = {"text": "0" * 64, "image": "1" * 64}


def write_pairs(folder: Path, train: tuple[int, ...] = (30, 30, 17, 30, 5), val: tuple[int, ...] = (6, 4)) -> Path:
    """Writes splits of some rows per part; the image ids of a row are its number in base 256."""
    splits: dict[str, Any] = {}
    for split, sizes in (("train", train), ("val", val)):
        parts = []
        for number, size in enumerate(sizes):
            start = sum(sizes[:number])

            def rows(start: int = start, size: int = size) -> Iterator[dict[str, Any]]:
                for row in range(start, start + size):
                    texts = [np.arange(row % 7 + caption) for caption in range(1 + row % 3)]
                    image_ids = np.array([row >> 8, row & 255, 1, 2])
                    yield {"id": str(row), "image_ids": image_ids, "text_ids": texts, "meaning": ""}

            target = part_folder(folder, split, number)
            target.parent.mkdir(parents=True, exist_ok=True)
            counts = {"caption_tokens": {"1": sum(1 + row % 3 for row in range(start, start + size))}}
            write_part(target, rows, pair_features(1000, 4, 2**16), lambda counts=counts: counts)  # type: ignore[misc]
            parts.append(read_part(target)["sha256"])
        splits[split] = {"rows": sum(sizes), "parts": parts, "rejects": {}, "caption_tokens": {"1": 1}}
    write_index(folder, {"tokenizers": TOKENIZERS, "splits": splits, RECURRING: {"images": 0, "first": None}})
    return folder

"""Validation images that recur in training: counted once, when shards are complete."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.shards.columns import PairColumns
from t2i_lm.data.shards.format import open_split, read_index
from t2i_lm.storage.resumable import write_atomic

# Key of the index: `images` that recur, and the ids of the `first` with its twin.
RECURRING = "recurring"


def recurring_images(folder: Path) -> dict[str, Any]:
    """The number of validation images whose ids are those of a training image, and the first such pair by id."""
    val, train = open_split(folder, "val"), open_split(folder, "train")
    held_out = [_digest(ids_N) for ids_N in PairColumns(val).image_rows()]
    twins = dict.fromkeys(held_out, -1)
    for row, ids_N in enumerate(PairColumns(train).image_rows()):
        digest = _digest(ids_N)
        if twins.get(digest) == -1:
            twins[digest] = row
    recurring = [row for row, digest in enumerate(held_out) if twins[digest] >= 0]
    first = [val[recurring[0]]["id"], train[twins[held_out[recurring[0]]]]["id"]] if recurring else None
    return {"images": len(recurring), "first": first}


def require_held_out(config: ExperimentConfig, folder: Path) -> None:
    """Checks that validation images do not recur in training; counts them where the index has no count yet.

    Generated scenes are counted only: they are few, and their split is by what they show.

    Raises:
        ValueError: if their share exceeds `data.max_recurring_share`.
    """
    index = read_index(folder)
    assert index is not None
    if RECURRING not in index:
        index[RECURRING] = recurring_images(folder)
        with suppress(OSError):  # a cache that others wrote, and that is only read here
            file = folder / "index.json"
            prepared = file.stat().st_mtime_ns
            write_atomic(file, json.dumps(index, indent=2, sort_keys=True) + "\n")
            os.utime(file, ns=(prepared, prepared))
    found, of = index[RECURRING], index["splits"]["val"]["rows"]
    if config.data.source != "scenes" and found["images"] > of * config.data.max_recurring_share:
        one, twin = found["first"]
        raise ValueError(
            f"{found['images']:,} of {of:,} validation images have the ids of a training image (the first: {one}, "
            f"of {twin}), so validation would measure what was trained on. Remove them, or raise "
            f"data.max_recurring_share={config.data.max_recurring_share}"
        )


def _digest(ids_N: Any) -> bytes:
    return hashlib.blake2b(ids_N, digest_size=16).digest()

"""Validation images that recur in training: counted once, when shards are complete."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig
from t2i_lm.data.shards.cache import say
from t2i_lm.data.shards.columns import PairColumns
from t2i_lm.data.shards.format import INDEX, PARTS, read_index, validation_splits, validations_in, write_index
from t2i_lm.data.shards.parts import Parts
from t2i_lm.data.text import dataset_split, is_on_hub, same_dataset
from t2i_lm.storage.sealed import DIGEST

# Key of the index: `images` that recur, and the ids of the `first` with its twin; by split where there are several.
RECURRING = "recurring"
RECURRING_TEXT = "recurring_text"  # of plain text: what `recurring_documents` returns


def recurring_images(folder: Path) -> dict[str, dict[str, Any]]:
    """By validation split: the number of images whose ids are those of a training image, and the first such pair."""
    train = Parts(folder, "train")
    validations = {split: Parts(folder, split) for split in validation_splits(folder)}
    held_out = {
        split: [ids_digest(ids_N) for ids_N in PairColumns(rows).image_rows()] for split, rows in validations.items()
    }
    twins = dict.fromkeys((digest for digests in held_out.values() for digest in digests), -1)
    for row, ids_N in enumerate(PairColumns(train).image_rows()):
        digest = ids_digest(ids_N)
        if twins.get(digest) == -1:
            twins[digest] = row
    found = {}
    for split, digests in held_out.items():
        recurring = [row for row, digest in enumerate(digests) if twins[digest] >= 0]
        first = None
        if recurring:
            first = [validations[split].id(recurring[0]), train.id(twins[digests[recurring[0]]])]
        found[split] = {"images": len(recurring), "first": first}
    return found


def recurring_of(index: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `recurring_images` found, as an index records it; empty if it has not been counted."""
    found = index.get(RECURRING, {})
    return {"val": found} if "images" in found else {split: found[split] for split in validations_in(index) if found}


def require_held_out(config: ExperimentConfig, folder: Path) -> None:
    """Checks that validation images do not recur in training; counts them, and parts, where the index does not yet.

    An index of an older version gets its digest here, which is said.

    Generated scenes are counted only: different images may have equal ids.

    Raises:
        ValueError: if their share exceeds `data.max_recurring_share`.
    """
    index = read_index(folder)
    assert index is not None
    if not {RECURRING, PARTS, DIGEST} <= index.keys():
        if RECURRING not in index:
            counted = recurring_images(folder)
            index[RECURRING] = counted.get("val", counted)
        for split in index["splits"]:
            Parts(folder, split)  # checks counts and sizes
        if DIGEST not in index:
            say(f"{folder / INDEX} is of an older version, without a digest of its own; its counts fit its parts")
        with suppress(OSError):  # a cache that others wrote, and that is only read here
            prepared = (folder / INDEX).stat().st_mtime_ns
            write_index(folder, index)
            os.utime(folder / INDEX, ns=(prepared, prepared))
    for split, found in recurring_of(index).items():
        of = index["splits"][split]["rows"]
        images = "validation images" if split == "val" else f"images of {split}"
        if config.data.source != "scenes" and found["images"] > of * config.data.max_recurring_share:
            one, twin = found["first"]
            raise ValueError(
                f"{found['images']:,} of {of:,} {images} have the ids of a training image (the first: {one}, "
                f"of {twin}), so validation would measure what was trained on. Remove them, or raise "
                f"data.max_recurring_share={config.data.max_recurring_share}"
            )


def require_other_dataset(data: DataConfig) -> None:
    """Checks that held-out text on a hub is not the text that is trained on; says that more is not compared there.

    Raises:
        ValueError: if it is the same split, and `data.max_recurring_share` allows less than all of it.
    """
    path, held_out = str(data.path), str(data.val_path)
    keys = {"data.path": path, "data.val_path": held_out}
    on_hub = [f"{key}={name}" for key, name in keys.items() if is_on_hub(name)]
    if same_dataset(path, held_out):
        if data.max_recurring_share < 1:
            raise ValueError(
                f"data.val_path={held_out}: the text of data.path={path}, so validation would measure what was "
                f"trained on. Name another split ({dataset_split(path)[0]}:SPLIT), or raise "
                f"data.max_recurring_share={data.max_recurring_share}"
            )
    elif on_hub:
        say(f"{' and '.join(on_hub)}: on a hub; whether documents of data.val_path are also in data.path is not known")


def require_held_out_text(config: ExperimentConfig, index: dict[str, Any]) -> None:
    """Checks that documents of held-out text are not trained on, where its index counts them.

    Raises:
        ValueError: if their share exceeds `data.max_recurring_share`.
    """
    found, data = index.get(RECURRING_TEXT), config.data
    if found is not None and found["documents"] > found["of"] * data.max_recurring_share:
        raise ValueError(
            f"data.val_path={data.val_path}: {found['documents']:,} of {found['of']:,} documents are also in data.path="
            f"{data.path} (the first: {found['first']!r}), so validation would measure what was trained on. Remove "
            f"them, or raise data.max_recurring_share={data.max_recurring_share}"
        )


def ids_digest(ids_N: Any) -> bytes:
    """Digest of the ids of an image."""
    return hashlib.blake2b(ids_N, digest_size=16).digest()

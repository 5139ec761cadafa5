"""Training on a Hugging Face dataset without a local copy: `data.source=hub_stream`.

A part is a row group of a Parquet file. Its number of rows is known from the file's footer, so the order of a run is
known at its start. The row group is read, its images tokenized and its captions encoded, when a part is first needed or
some batches before, by one process of a machine; the ids are kept in a bounded folder. Validation rows are few: they
are prepared as local shards at the start. The parts are in `made_parts.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.pairs import Pair, Sample
from t2i_lm.data.permutation import Permutation
from t2i_lm.data.shards.cache import FORMAT, Prepared, absolute_path, say, shards_of, write_once
from t2i_lm.data.shards.format import PARTS, STREAM, read_index, write_index
from t2i_lm.data.shards.prepare import prepare_pairs, split_entry, write_pair_split
from t2i_lm.data.shards.remote import RemoteError, is_url
from t2i_lm.data.shards.row_groups import (
    PREPARE,
    StoredFile,
    StoredSplits,
    find_splits,
    pixel_digest,
    samples_of,
    write_digests,
)
from t2i_lm.data.splits import HELD_OUT_EVERY
from t2i_lm.data.tables import Columns, base_folder
from t2i_lm.tokenizers.base import ImageTokenizer, TextTokenizer


def training_shards(
    config: ExperimentConfig, text: TextTokenizer, image: ImageTokenizer, run: Mapping[str, Any] | None = None
) -> Path:
    """The folder that an experiment trains on: token shards, or the index of a dataset whose parts are made on the way.

    Shards that `prepare` has written for `data.source=hub_stream` are used where they are complete. They hold all
    validation rows, of which a run uses the first `data.val_size`.

    Args:
        config: the experiment.
        text: its text tokenizer.
        image: its image tokenizer.
        run: env.json of the run that continues; None for a new one.

    Raises:
        ValueError: as `prepare_pairs` does, or if the dataset cannot be streamed.
    """
    if config.data.source != "hub_stream":
        return prepare_pairs(config, text, image, run)
    tokenizers = {"text": text.sha256, "image": image.sha256}
    if not is_url(str(config.data.path)):
        whole = replace(config, data=replace(config.data, val_size=None))
        index = read_index(shards_of(whole, tokenizers, image.vocab_size > 2**16).folder)
        if index is not None and (not run or run.get("data_hash") in (None, index["data_hash"])):
            size, rows = config.data.val_size, index["splits"]["val"]["rows"]
            if size is not None and size < rows:
                say(f"data.val_size={size}: the first of {rows:,} validation rows are used")
            return prepare_pairs(whole, text, image, run)
    return _streamed(config, text, image)


def _streamed(config: ExperimentConfig, text: TextTokenizer, image: ImageTokenizer) -> Path:
    """Finds the row groups of a dataset, and prepares its validation rows."""
    data, origin = config.data, f"data.path={config.data.path}"
    _require_streamable(config)
    found = find_splits(str(data.path), origin)
    columns = _columns(found, origin)
    train = [(file, group) for file in range(len(found.train)) for group in range(len(found.train[file].rows))]
    val, held_out, notes = _held_out(found, train, data.val_size, origin)
    base = base_folder(config.data)
    entry = {
        "rows": sum(found.train[file].rows[group] for file, group in train if (file, group) not in held_out),
        "rejects": {},
        "files": [file.content for file in found.train],
        "held_out": sorted(held_out),
    }
    tokenizers = {"text": text.sha256, "image": image.sha256}
    settings = {
        "format": FORMAT,
        "path": absolute_path(data.path),
        "train": entry,
        "val": [[file.content, group] for file, group in val],
        "val_size": data.val_size,
        "image_size": config.image_tokenizer.size,
        "max_reject_share": data.max_reject_share,
        "tokenizers": tokenizers,
    }
    prepared = Prepared(Path(data.cache_dir), "hub_stream-live", settings)
    _require_room(config, found, image)

    def write(folder: Path) -> None:
        index = {
            "tokenizers": tokenizers,
            "source": data.source,
            "notes": {"train": notes},
            "splits": {"train": entry, "val": split_entry(parts)},
            PARTS: {"train": []},
            STREAM: {"urls": [file.url for file in found.train], "columns": list(columns), "base": base},
        }
        write_index(folder, index)

    target = prepared.folder
    if read_index(target) is None:
        prepared.write_key()
        source = _Groups(val, columns, base, data.val_size, target)
        parts = write_pair_split(config, target, "val", source, text, image)
        write_once(prepared, write)
    index = read_index(target)
    assert index is not None
    largest = max(max(file.rows, default=0) for file in found.train)
    say(
        f"streaming {data.path}: {entry['rows']:,} train rows in {len(train) - len(held_out):,} row groups of "
        f"{len(found.train):,} files, {index['splits']['val']['rows']:,} val rows, data hash {index['data_hash']}; the "
        f"first batch requires {data.shuffle_parts} row groups of up to {largest:,} images"
    )
    return target


def _require_streamable(config: ExperimentConfig) -> None:
    data, source = config.data, "with data.source=hub_stream"
    refused = {
        f"data.shuffle_parts={data.shuffle_parts}: expected a number of parts, such as 16,": data.shuffle_parts is None,
        f"data.train_size={data.train_size}: expected null": data.train_size is not None,
        "data.captions=all: expected random or first": data.captions == "all",
        f"data.text_ratio={data.text_ratio}: expected null": data.text_ratio is not None,
        "align.shuffle_pairs=True: expected false": config.align.shuffle_pairs,
        f"image_tokenizer.precision={config.image_tokenizer.precision}: expected float32": (
            config.image_tokenizer.precision != "float32"
        ),
    }
    for message, holds in refused.items():
        if holds:
            # `prepare` reads names and folders, and takes no size either.
            remedy = "" if is_url(str(data.path)) or message.startswith("data.train_size") else f"; or {PREPARE}"
            raise ValueError(f"{message} {source}, which is read while training{remedy}")


def _columns(found: StoredSplits, origin: str) -> tuple[str, str]:
    """Names of the image and caption columns, which all files have."""
    files = [*found.train, *(found.val or ())]
    first = Columns.find(datasets.Features.from_arrow_schema(files[0].schema), f"{origin}: {files[0].name}")
    for file in files:
        schema = file.schema
        assert schema is not None
        missing = [name for name in (first.image, first.caption) if name not in schema.names]
        if missing:
            raise ValueError(f"{origin}: {file.name} has no column {missing[0]}, which {files[0].name} has")
        if is_url(file.url) and pa.types.is_string(schema.field(first.image).type):
            raise ValueError(
                f"{origin}: column {first.image} of {file.name} holds paths of images, and only images in the Parquet "
                "files are streamed"
            )
    return first.image, first.caption


Group = tuple[int, int]


def _held_out(
    found: StoredSplits, train: list[Group], val_size: int | None, origin: str
) -> tuple[list[tuple[StoredFile, int]], set[Group], list[str]]:
    """The validation row groups, those of them that are in training files, and what is to be told.

    They are those of the dataset's own validation split, or else a twentieth of the training row groups, drawn by a
    fixed seed; with a `val_size`, as many as hold so many rows.
    """
    if found.val is not None:
        own = [(file, group) for file in found.val for group in range(len(file.rows))]
        return _up_to(own, val_size), set(), found.notes
    if len(train) < 2:
        remedy = "write smaller ones" if is_url(origin) else PREPARE
        raise ValueError(
            f"{origin}: no validation split, and its training split is one row group, so that none can be held out; "
            f"{remedy}"
        )
    drawn = [train[number] for number in Permutation(len(train), "held out")[np.arange(len(train))]]
    most = len(train) - 1 if val_size else max(1, len(train) // HELD_OUT_EVERY)
    chosen = _up_to([(found.train[file], group) for file, group in drawn[:most]], val_size)
    held_out = set(drawn[: len(chosen)])
    note = (
        f"{origin}: no validation split; {len(chosen):,} of {len(train):,} row groups are held out, and rows of others "
        "that have their images are replaced"
    )
    return chosen, held_out, [*found.notes, note]


def _up_to(groups: list[tuple[StoredFile, int]], rows: int | None) -> list[tuple[StoredFile, int]]:
    """The first row groups that hold so many rows; all where it is None."""
    if rows is None:
        return groups
    held = np.cumsum([file.rows[group] for file, group in groups])
    return groups[: int(np.searchsorted(held, rows)) + 1]


def _require_room(config: ExperimentConfig, found: StoredSplits, image: ImageTokenizer) -> None:
    data = config.data
    largest = max(max(file.rows, default=0) for file in found.train)
    row = image.grid[0] * image.grid[1] * (2 if image.vocab_size <= 2**16 else 4) + 2 * data.length
    least = 2 * int(data.shuffle_parts or 1) * largest * row
    if data.remote_cache_gib * 2**30 < least:
        raise ValueError(
            f"data.remote_cache_gib={data.remote_cache_gib}: expected at least {least / 2**30:.3g} GiB, twice "
            f"data.shuffle_parts={data.shuffle_parts} row groups of up to {largest:,} rows"
        )


@dataclass(frozen=True)
class _Groups:
    """Row groups as a streamed source of pairs: each is a shard. Digests of their pixels are written to a folder."""

    groups: list[tuple[StoredFile, int]]
    columns: tuple[str, str]
    base: str
    size: int | None
    folder: Path

    @property
    def shards(self) -> int:
        return len(self.groups)

    def shard(self, number: int) -> Iterator[Sample]:
        """The samples of one row group, in order, as far as `size` goes."""
        before = sum(file.rows[group] for file, group in self.groups[:number])
        file, group = self.groups[number]
        try:
            samples = samples_of(file, group, self.columns, self.base)
        except RemoteError as error:
            raise ValueError(f"{file.url} {error}") from error
        digests = list[str]()
        for read in islice(samples, None if self.size is None else self.size - before):
            yield partial(_noted, read, digests)
        write_digests(self.folder, number, digests)


def _noted(read: Sample, digests: list[str]) -> Pair:
    pair = read()
    digests.append(pixel_digest(pair.image))
    return pair


def is_streamed(name: str) -> bool:
    """Whether an `id` is of a row group; the others are of shards that `prepare` has written."""
    return not name.startswith("shard ")


def images_of(config: ExperimentConfig, names: Sequence[str]) -> Iterator[Sample]:
    """The samples with some ids, of the dataset as it is now.

    Raises:
        ValueError: if it cannot be read.
    """
    data, wanted = config.data, set(names)
    origin = f"data.path={data.path}"
    found = find_splits(str(data.path), origin)
    columns, base = _columns(found, origin), base_folder(config.data)
    for file in [*found.train, *(found.val or ())]:
        for group, rows in enumerate(file.rows):
            places = [place for place in range(rows) if file.row_name(group, place) in wanted]
            if places:
                samples = list(samples_of(file, group, columns, base))
                yield from (samples[place] for place in places)

"""Token shards: memory-mapped Arrow files written by `datasets`, with an index of counts and hashes.

A folder has `SPLIT/part-00000`, ... and `index.json`, which marks it as complete. Splits are `train` and `val`, or for
scenes `train`, `val/iid` and `val/compositional`. A part with its `part.json` is written to a temporary folder and
renamed, so that an interrupted preparation continues after the last complete part. `parts.py` reads parts. Index and
`part.json` hold digests of themselves; the JSON that `datasets` writes beside the Arrow files is not read.

Pair shards have columns `id`, `image_ids` (fixed-size list), `text_ids` (all captions, a list of lists) and `meaning`
(JSON, scenes only); text shards have `text_ids` (length + 1 ids: neighbors overlap by one, so every token is a target
once) and `bytes`. Ids are uint16, or uint32 above 65,536 of them; text and image ids are separate because their joint
vocabulary rarely fits uint16.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets

from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.run_folder import PRIMARY, VAL
from t2i_lm.storage.sealed import opened, read_sealed, sealed
from t2i_lm.storage.writing import write_atomic, writing

# `prepare` reports its own progress.
datasets.disable_progress_bars()

INDEX, PART = "index.json", "part.json"
# Key of the index: rows, captions and sizes of the files of each part, by split.
PARTS = "parts"
# Key of the index of a dataset whose training rows are made while they are read (`made_parts.py`): where they lie.
STREAM = "stream"
CARD_BIN = 10  # caption lengths per row of the histogram in README.md
Rows = Callable[[], Iterator[dict[str, Any]]]


def text_features(text_vocab: int, length: int) -> datasets.Features:
    """Schema of text shards with `length` + 1 ids per row."""
    ids = datasets.Value("uint16" if text_vocab <= 2**16 else "uint32")
    return datasets.Features({"text_ids": datasets.List(ids, length=length + 1), "bytes": datasets.Value("int32")})


def pair_features(text_vocab: int, image_tokens: int, codes: int) -> datasets.Features:
    """Schema of caption-image shards with image ids below `codes`."""
    ids, image_ids = (datasets.Value("uint16" if size <= 2**16 else "uint32") for size in (text_vocab, codes))
    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "image_ids": datasets.List(image_ids, length=image_tokens),
            "text_ids": datasets.List(datasets.List(ids)),
            "meaning": datasets.Value("string"),
        }
    )


def part_folder(folder: Path, split: str, number: int) -> Path:
    """Folder of one part of a split."""
    return folder / split / f"part-{number:05d}"


def write_part(
    target: Path,
    rows: Rows,
    features: datasets.Features,
    details: Callable[[], dict[str, Any]],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Writes one part atomically.

    Args:
        target: folder of the part.
        rows: generator of its rows.
        features: its schema.
        details: further fields of its `part.json`, called after all rows are written.
        check: called when all is written; no part is left of one that it refuses by an error.

    Raises:
        OSError: if the disk is full, naming the part; parts that are complete stay.
    """
    work = target.with_name(f"{target.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    try:
        with writing(target, work):
            _write_part(target, work, rows, features, details)
            check()
            (work / "data").rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_part(
    target: Path, work: Path, rows: Rows, features: datasets.Features, details: Callable[[], dict[str, Any]]
) -> None:
    stream = rows()
    first = next(stream, None)
    count = 0
    (work / "data").mkdir(parents=True)
    if first is not None:  # `datasets` cannot write an empty part
        try:
            dataset = datasets.Dataset.from_generator(
                lambda: chain([first], stream),
                features=features,
                cache_dir=str(work / "cache"),
                # By default the library pickles the generator to hash it.
                fingerprint=f"{target.parent.name}-{target.name}",
            )
        except datasets.exceptions.DatasetGenerationError as error:  # wraps any exception of `rows`
            raise error.__cause__ or error from error
        assert isinstance(dataset, datasets.Dataset)
        dataset.save_to_disk(str(work / "data"))
        count = len(dataset)
    shards = {file.name: file_sha256(file) for file in sorted((work / "data").glob("*.arrow"))}
    entry = sealed({"rows": count, "sha256": shards, **details()})
    (work / "data" / PART).write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")


def read_part(target: Path) -> dict[str, Any]:
    """The `part.json` of a complete part.

    Raises:
        ValueError: if it is damaged or missing.
    """
    remedy = f"delete {target} to prepare this part again (python -m t2i_lm.prepare)"
    try:
        entry = read_sealed(target / PART, remedy)
    except OSError as error:
        raise ValueError(f"{target / PART} cannot be read: {error.strerror}; {remedy}") from error
    if not isinstance(entry.get("rows"), int) or not isinstance(entry.get("sha256"), dict):
        raise ValueError(f"{target / PART} is damaged: no rows and sha256; {remedy}")
    return entry


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Writes `index.json` with its `data_hash`, the sizes of parts and a digest; this marks the folder as complete."""
    parts = {split: part_entries(folder, index, split) for split in index["splits"]}
    index = sealed(index | {"data_hash": data_hash(index), PARTS: parts})
    write_atomic(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_card(folder: Path, index: dict[str, Any], origin: str) -> None:
    """Writes `README.md`: source, number of pairs, rejected samples, histogram of caption lengths."""
    lines = ["# Token shards", "", f"Source: {index['source']}, {origin}.", ""]
    lines += [f"{name.capitalize()} tokenizer sha256: `{digest}`" for name, digest in index["tokenizers"].items()]
    for split, entry in index["splits"].items():
        lengths = {int(length): count for length, count in entry["caption_tokens"].items()}
        captions = sum(lengths.values())
        mean = sum(length * count for length, count in lengths.items()) / max(1, captions)
        lines += [
            "",
            f"## {split}",
            "",
            f"{entry['rows']:,} images, {captions:,} captions of {mean:.1f} ids on average.",
        ]
        lines += [f"Left out: {count:,} ({reason})." for reason, count in sorted(entry["rejects"].items())]
        lines += ["", "| caption ids | captions |", "|---|---|"]
        for low in range(0, max(lengths, default=0) + 1, CARD_BIN):
            count = sum(lengths.get(length, 0) for length in range(low, low + CARD_BIN))
            lines.append(f"| {low} to {low + CARD_BIN - 1} | {count:,} |")
    write_atomic(folder / "README.md", "\n".join(lines) + "\n")


def data_hash(index: dict[str, Any]) -> str:
    """Hash of a prepared folder's content: shard and tokenizer hashes, independent of its path."""
    content = {key: index[key] for key in ("splits", "tokenizers") if key in index}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder; None if it is incomplete or absent.

    Raises:
        ValueError: if the index is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    remedy = "delete it to have it written again (python -m t2i_lm.prepare), or restore it from where it was copied"
    return checked_index(path.read_bytes(), str(path), remedy)


def checked_index(text: bytes, place: str, remedy: str) -> dict[str, Any]:
    """The index in the text of a file at `place`. Indices of older versions have no digest but a hash of their splits.

    Raises:
        ValueError: naming place and remedy, if it is damaged.
    """
    index = opened(text, place, remedy)
    splits = index.get("splits")
    if not isinstance(splits, dict) or not all(isinstance(entry, dict) for entry in splits.values()):
        raise ValueError(f"{place} is no index of token shards; {remedy}")
    if index.get("data_hash", found := data_hash(index)) != found:
        raise ValueError(f"{place} is damaged: its data hash is {found}; {remedy}")
    return index


def validation_splits(folder: Path) -> tuple[str, ...]:
    """Names of the validation splits of a complete folder, the primary one first.

    Raises:
        ValueError: if the folder is not complete.
    """
    index = read_index(folder)
    if index is None:
        raise ValueError(f"no token shards in {folder}: run python -m t2i_lm.prepare")
    return validations_in(index)


def validations_in(index: dict[str, Any]) -> tuple[str, ...]:
    """Names of the validation splits in an index, the primary one first."""
    names = sorted(name for name in index["splits"] if name != "train")
    return tuple(sorted(names, key=lambda name: name != f"{VAL}/{PRIMARY}"))


def part_entries(folder: Path, index: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """`rows`, `captions` and `bytes` of each part of a split: the index's, or those of its files (older versions)."""
    if split in index.get(PARTS, {}):
        return list(index[PARTS][split])
    entries = []
    for number, files in enumerate(index["splits"][split].get("parts", [])):
        target = part_folder(folder, split, number)
        part = read_part(target)
        entry = {"rows": part["rows"], "bytes": {name: (target / name).stat().st_size for name in files}}
        if "caption_tokens" in part:
            entry["captions"] = sum(part["caption_tokens"].values())
        entries.append(entry)
    return entries

"""Token shards: memory-mapped Arrow files written by `datasets`, with an index of counts and hashes.

A folder has `SPLIT/part-00000`, ... and `index.json`, which marks it as complete. Splits are `train` and `val`, or for
scenes `train`, `val/iid` and `val/compositional`. A part with its `part.json` is written to a temporary folder and
renamed, so that an interrupted preparation continues after the last complete part.
Opening a split reads the index and compares sizes of files, whatever their content; a part is opened, and its sha256
verified, when it is first read, and again when its size, modification time or inode has changed since. Where the parts
lie elsewhere (`remote.py`), it is fetched then. Index and `part.json` hold digests of themselves; the JSON that
`datasets` writes beside the Arrow files is not read.

Pair shards have columns `id`, `image_ids` (fixed-size list), `text_ids` (all captions, a list of lists) and `meaning`
(JSON, scenes only); text shards have `text_ids` (length + 1 ids: neighbors overlap by one, so every token is a target
once) and `bytes`. Ids are uint16, or uint32 above 65,536 of them; text and image ids are separate because their joint
vocabulary rarely fits uint16.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from t2i_lm.data.order import Indices
from t2i_lm.data.shards.remote import FETCHES, RemoteFiles
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


def write_part(target: Path, rows: Rows, features: datasets.Features, details: Callable[[], dict[str, Any]]) -> None:
    """Writes one part atomically.

    Args:
        target: folder of the part.
        rows: generator of its rows.
        features: its schema.
        details: further fields of its `part.json`, called after all rows are written.

    Raises:
        OSError: if the disk is full, naming the part; parts that are complete stay.
    """
    work = target.with_name(f"{target.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    try:
        with writing(target, work):
            _write_part(target, work, rows, features, details)
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
    (work / "data").rename(target)


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


class PartError(ValueError):
    """A part that cannot be read; one line, also when a worker of a DataLoader raises it with its traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{PartError.__name__}: ")[2])


class Parts:
    """A split of token shards, part by part.

    Attributes:
        rows: rows of each part.
        captions: captions of each part; None for shards of text, or whose parts do not count them.
    """

    def __init__(self, folder: Path, split: str) -> None:
        """Reads the index, and compares the sizes of files with it.

        Raises:
            ValueError: if there are no shards or no rows, or a file is missing or of another size.
        """
        index = read_index(folder)
        if index is None:
            raise ValueError(f"no token shards in {folder}: run python -m t2i_lm.prepare")
        self.folder, self.split = folder, split
        if STREAM in index and split == "train":
            raise ValueError(
                f"{folder / split}: with data.source=hub_stream, training rows are made while training; this requires "
                "shards of all of them, which python -m t2i_lm.prepare writes"
            )
        self._files: list[dict[str, str]] = index["splits"][split]["parts"]
        try:
            entries = part_entries(folder, index, split)
        except (OSError, ValueError) as error:  # of part.json
            raise ValueError(f"token shards in {folder / split} cannot be read: {error}; {self._remedy}") from error
        self.rows: Indices = np.array([entry["rows"] for entry in entries], dtype=np.int64)
        captions = [entry.get("captions") for entry in entries]
        self.captions: Indices | None = None if None in captions else np.array(captions, dtype=np.int64)
        self._bytes: list[dict[str, int]] = [entry.get("bytes", {}) for entry in entries]
        if len(entries) != len(self._files) or len(self) != index["splits"][split]["rows"]:
            raise ValueError(
                f"{folder / INDEX} is damaged: {len(self):,} rows in {len(entries)} parts of {split}, not "
                f"{index['splits'][split]['rows']:,} in {len(self._files)}; {self._remedy}"
            )
        self._remote = RemoteFiles.of(folder)
        # State of each part's files when they were verified, 0 before; in memory that workers share, so that one of
        # them verifies a part.
        self._verified = torch.zeros(len(entries), dtype=torch.int64)
        self._verified.share_memory_()  # type: ignore[no-untyped-call]
        self._paths: dict[int, tuple[str, ...]] = {}
        self._mapped: dict[int, list[int] | None] = {}  # inodes of the files of `dataset`
        self._threads: ThreadPoolExecutor | None = None
        self._asked: set[int] = set()
        if not len(self):
            raise ValueError(f"{folder / split} has no usable sample")
        if self._remote is None:
            for number in range(len(self._files)):
                self._require_sizes(number)

    def __len__(self) -> int:
        return int(self.rows.sum())

    @property
    def largest(self) -> int:
        """Bytes of the largest part; 0 where the index does not tell."""
        return max(sum(sizes.values()) for sizes in self._bytes)

    @property
    def is_remote(self) -> bool:
        """Whether parts are fetched."""
        return self._remote is not None

    def table(self, number: int) -> pa.Table:
        """The rows of a part, memory-mapped: they are those that were verified while its `state` stays.

        Raises:
            PartError: if it cannot be fetched, or a file is damaged.
        """
        table = pa.concat_tables([_map(file) for file in self.files(number)])
        if table.num_rows != self.rows[number]:
            counted = f"{self.rows[number]:,} rows of part {number} of {self.split}, which has {table.num_rows:,}"
            raise PartError(f"{self.folder / INDEX} is damaged: {counted}; {self._remedy}")
        return table

    def id(self, row: int) -> str:
        """The `id` of a row."""
        number = int(np.searchsorted(np.cumsum(self.rows), row, side="right"))
        return str(self.table(number)["id"][row - int(self.rows[:number].sum())])

    def dataset(self) -> datasets.Dataset:
        """All parts in numpy format, memory-mapped, after all of them are verified; see `require_unchanged`."""
        files = [file for number in range(len(self._files)) for file in self.files(number)]
        self._mapped = {number: self._inodes(number) for number in range(len(self._files))}
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files]).with_format(
            "numpy"
        )

    def files(self, number: int) -> list[Path]:
        """The files of a part, present and verified.

        Raises:
            PartError: if one cannot be fetched, or is damaged.
        """
        paths, verified = [], self._is_verified(number)
        before = self.state(number)
        for name, sha256 in self._files[number].items():
            place = f"{part_folder(Path(self.split), '', number).as_posix()}/{name}"
            path = part_folder(self.folder, self.split, number) / name
            try:
                if self._remote is not None:
                    path = self._remote.fetch(place, sha256, verified)
                elif not verified and file_sha256(path) != sha256:
                    raise self._damaged(path)
            except OSError as error:
                raise PartError(f"token shard {path} cannot be read: {error.strerror or error}") from error
            except ValueError as error:
                raise PartError(str(error)) from error
            paths.append(path)
        if not verified:
            # Local files that change while they are hashed are verified again; remote ones are replaced at once.
            self._verified[number] = (before if self._remote is None else self.state(number)) or 0
        return paths

    def require_unchanged(self) -> None:
        """Checks that the files of `dataset` are as they were verified: what is mapped can change while it is read.

        It takes a call of the system per file; a file with another size, time or inode is verified again. To be
        called before rows are read, since a cut file would end the process by SIGBUS, and after.

        Raises:
            PartError: naming the file that has changed.
        """
        for number, inodes in self._mapped.items():
            if self.state(number) not in (int(self._verified[number]), None):
                self.files(number)
            if self._inodes(number) not in (inodes, None):
                raise PartError(f"token shard {self._paths[number][0]} was replaced under the run; resume it")

    def state(self, number: int) -> int | None:
        """A hash of size, modification time and inode of a part's files; None if one is gone, whose maps remain.

        Raises:
            PartError: if the system does not tell.
        """
        found = self._status(number)
        if found is None:
            return None
        return hash(tuple((file.st_size, file.st_mtime_ns, file.st_ino) for file in found)) or 1

    def verified_state(self, number: int) -> int:
        """The `state` in which a part was verified; 0 before."""
        return int(self._verified[number])

    def _inodes(self, number: int) -> list[int] | None:
        found = self._status(number)
        return None if found is None else [file.st_ino for file in found]

    def _status(self, number: int) -> list[os.stat_result] | None:
        paths = self._paths.get(number)
        if paths is None:
            paths = self._paths[number] = tuple(self._places(number))
        try:
            return [os.stat(path) for path in paths]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PartError(f"token shard {error.filename} cannot be read: {error.strerror}") from error

    def _is_verified(self, number: int) -> bool:
        state = int(self._verified[number])
        return state != 0 and self.state(number) == state

    def _places(self, number: int) -> Iterator[str]:
        """Where the files of a part lie on this machine."""
        folder = part_folder(self.folder, self.split, number)
        for name, sha256 in self._files[number].items():
            yield str(folder / name if self._remote is None else Path(self._remote.folder, sha256))

    def fetch(self, numbers: Iterable[int]) -> None:
        """Fetches and verifies several parts at a time.

        Raises:
            PartError: if one cannot be fetched, or is damaged.
        """
        missing = [number for number in numbers if not self._is_here(number)]
        if len(missing) > 1:
            with ThreadPoolExecutor(FETCHES) as threads:
                list(threads.map(self.files, missing))

    def fetch_later(self, numbers: Iterable[int]) -> None:
        """Begins to fetch remote parts. One that cannot be fetched is tried again, and named, when it is read."""
        for number in numbers:
            if number not in self._asked and not self._is_here(number):
                self._threads = self._threads or ThreadPoolExecutor(FETCHES)
                self._asked.add(number)
                self._threads.submit(self._fetch_one, number)

    def _fetch_one(self, number: int) -> None:
        with suppress(PartError):
            self.files(number)
        self._asked.discard(number)

    def _is_here(self, number: int) -> bool:
        if self._remote is None:
            return self._is_verified(number)
        return all(self._remote.has(sha256) for sha256 in self._files[number].values())

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_threads": None, "_asked": set(), "_paths": {}}

    def _require_sizes(self, number: int) -> None:
        for name in self._files[number]:
            path = part_folder(self.folder, self.split, number) / name
            try:
                size = path.stat().st_size
            except OSError:
                raise ValueError(f"token shard {path} is missing; {self._remedy}") from None
            expected = self._bytes[number].get(name, size)
            if size != expected:
                raise ValueError(
                    f"token shard {path} is damaged: {size:,} bytes, index.json says {expected:,}; {self._remedy}"
                )

    def _damaged(self, path: Path) -> ValueError:
        return ValueError(f"token shard {path} is damaged: its sha256 differs from index.json; {self._remedy}")

    @property
    def _remedy(self) -> str:
        return f"delete {self.folder} to prepare it again, or restore it from where it was copied"


def open_split(folder: Path, split: str) -> datasets.Dataset:
    """A whole split in numpy format, memory-mapped, after all of its parts are verified.

    Raises:
        ValueError: if a part is missing or damaged.
    """
    return Parts(folder, split).dataset()


def _map(file: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()

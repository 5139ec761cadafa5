"""Row groups of Parquet files that lie anywhere: found by their footers, read one at a time by byte ranges."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from t2i_lm.data.pairs import Pair, Sample
from t2i_lm.data.shards.remote import RemoteError, is_url, open_place, persistently
from t2i_lm.data.splits import path_split
from t2i_lm.data.tables import Columns, hub_parts, require_no_pattern
from t2i_lm.storage.reading import reason
from t2i_lm.storage.writing import write_atomic

SUFFIXES = (".parquet", ".pq")
# Bytes at the end of a file that are read first: they hold most footers.
TAIL = 2**16
# Folder of the digests of validation images.
DIGESTS = "digests"
# Footers that are read at a time.
THREADS = 16
# Of the file systems' descriptions of a file: what changes with its content.
MARKS = ("ETag", "etag", "Content-MD5", "md5Hash", "xet_hash", "blob_id", "LastModified")
PREPARE = "run python -m t2i_lm.prepare once: training then reads the shards that it writes"


@dataclass(frozen=True)
class StoredFile:
    """A Parquet file.

    Attributes:
        name: its path in the dataset.
        size: its bytes.
        mark: what its place says of its content; None if nothing.
        footer: sha256 of its footer, which holds the sizes of all columns of all row groups.
        rows: rows of each row group.
        url: what fsspec opens.
        schema: of its columns; None where it is not known.
    """

    name: str
    size: int
    mark: str | None
    footer: str
    rows: tuple[int, ...]
    url: str
    schema: pa.Schema | None = field(default=None, compare=False, repr=False)

    @property
    def content(self) -> list[Any]:
        """All that identifies its content, wherever it lies, as JSON values."""
        return [self.name, self.size, self.mark, self.footer, list(self.rows)]

    def row_name(self, group: int, place: int) -> str:
        """The name of a row of a row group: the file, and its number in the file."""
        return f"{self.name} row {sum(self.rows[:group]) + place}"

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of a row group.

        Raises:
            RemoteError: if they cannot be read, or the file has changed.
        """

        def attempt() -> pa.Table:
            files, path = open_place(self.url)
            size = int(files.info(path)["size"])
            footer, metadata = _footer(self.url, size) if size == self.size else ("", None)
            if footer != self.footer:
                raise RemoteError("has changed since the run was started; restore it, or start a new run")
            with files.open(path, "rb", cache_type="none") as file:  # exactly the ranges that are asked for
                return pq.ParquetFile(file, metadata=metadata, pre_buffer=True).read_row_group(
                    group, columns=list(columns)
                )

        return persistently(attempt, self.url)


def samples_of(file: StoredFile, group: int, columns: tuple[str, str], folder: str) -> Iterator[Sample]:
    """The samples of a row group, in order; ids name file and row.

    Raises:
        RemoteError: if it cannot be read.
    """
    table = file.read(group, columns).replace_schema_metadata(None)
    reader = Columns(*columns)
    rows = reader.select(datasets.Dataset(table))

    def read(place: int) -> Pair:
        name = file.row_name(group, place)
        return reader.pair(rows[place], name, name, folder)

    return (partial(read, place) for place in range(len(table)))


@dataclass(frozen=True)
class StoredSplits:
    """The Parquet files of a dataset: training, validation if it has a split of its own, and what is left out."""

    train: list[StoredFile]
    val: list[StoredFile] | None
    notes: list[str]


def find_splits(path: str, origin: str) -> StoredSplits:
    """The Parquet files of a Hugging Face dataset by name, or of a local folder or URL.

    Args:
        path: as `data.path`.
        origin: key and value, for error messages.

    Raises:
        ValueError: if there are none, their splits are not known, or a footer cannot be read.
    """
    named = _listed_at(path, origin) if is_url(path) else _listed_by_datasets(path, origin)
    parts = hub_parts(named, origin)
    notes = [note for note in parts.notes if "held out" not in note]  # here row groups are
    train, val = (None if part is None else _with_footers(part, origin) for part in (parts.train, parts.val))
    assert train is not None
    return StoredSplits(train, val, notes)


def _listed_by_datasets(path: str, origin: str) -> Mapping[str, dict[str, str]]:
    """URLs by name, by split, as `datasets` finds them: by a card's configuration, or words in names."""
    require_no_pattern(path, origin)
    try:
        builder = datasets.load_dataset_builder(path)
    except Exception as error:  # of network, builders and cards
        missing = f"no such Hugging Face dataset, or it is unreachable or unreadable: {reason(error)}"
        raise ValueError(f"{origin}: {missing}") from error
    reader = type(builder).__module__.split(".")[-1]
    if reader != "parquet":
        raise ValueError(f"{origin}: its files are of format {reader}, and only Parquet is streamed; {PREPARE}")
    root = str(Path(path).resolve()) if Path(path).exists() else ""

    def name(url: str) -> str:
        inside = url.removeprefix(root) if root else url.partition("@")[2].partition("/")[2]
        return (inside or PurePosixPath(url).name).lstrip("/")

    return {str(split): {name(str(url)): str(url) for url in urls} for split, urls in builder.config.data_files.items()}


def _listed_at(url: str, origin: str) -> Mapping[str, dict[str, str]]:
    """URLs by name, by split, of the Parquet files below a URL: split by words in names, as `datasets` does."""

    def attempt() -> tuple[list[str], str, Callable[[str], str]]:
        files, root = open_place(url.rstrip("/"))
        return sorted(files.find(root)), root, files.unstrip_protocol

    try:
        found, root, with_protocol = persistently(attempt, url)
    except RemoteError as error:
        raise ValueError(f"{origin} {error}") from error
    groups: dict[str | None, dict[str, str]] = {}
    for file in (file for file in found if file.lower().endswith(SUFFIXES)):
        name = file.removeprefix(root).lstrip("/") or PurePosixPath(file).name
        if any(part.startswith((".", "__")) for part in PurePosixPath(name).parts):
            continue
        try:
            groups.setdefault(path_split(PurePosixPath(name)), {})[name] = with_protocol(file)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error
    if not groups:
        raise ValueError(f"{origin}: no Parquet file among its {len(found):,} files, and only Parquet is streamed")
    if None in groups and len(groups) > 1:
        known, unknown = next(iter(groups[split] for split in groups if split)), groups[None]
        raise ValueError(
            f"{origin}: some names say the split and others do not ({next(iter(known))}, {next(iter(unknown))}), so "
            "that it is not known what is held out. Rename them, or name the folder of one split"
        )
    if None in groups:
        return {"train": groups[None]}
    names = {"val": "validation"}
    return {names.get(split, split): files for split, files in groups.items() if split is not None}


def _with_footers(named: Mapping[str, str], origin: str) -> list[StoredFile]:
    def read(item: tuple[str, str]) -> StoredFile:
        name, url = item
        try:
            return persistently(lambda: _stored(name, url), url)
        except RemoteError as error:
            raise ValueError(f"{origin}: {name} {error}") from error

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(read, sorted(named.items())))


def _stored(name: str, url: str) -> StoredFile:
    files, path = open_place(url)
    described = files.info(path)
    size = described.get("size")
    if size is None:
        raise RemoteError("cannot be read: its place does not tell its size, so that no part of it can be read")
    footer, metadata = _footer(url, int(size))
    rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    mark = next((str(described[key]) for key in MARKS if described.get(key)), None)
    return StoredFile(name, int(size), mark, footer, rows, url, metadata.schema.to_arrow_schema())


def _footer(url: str, size: int) -> tuple[str, pq.FileMetaData]:
    """The sha256 of a file's footer, and what it says."""
    tail = _tail(url, size, min(size, TAIL))
    if tail[-4:] != b"PAR1" or size < 12:
        raise RemoteError("cannot be read: no Parquet file")
    length = int.from_bytes(tail[-8:-4], "little")
    if length + 8 > len(tail):
        tail = _tail(url, size, min(size, length + 8))
    footer = tail[-length - 8 :]
    metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    return hashlib.sha256(footer).hexdigest()[:16], metadata


def _tail(url: str, size: int, length: int) -> bytes:
    files, path = open_place(url)
    content: bytes = files.cat_file(path, start=size - length, end=size)
    if len(content) > length:
        raise RemoteError("cannot be read: its server sends whole files and no parts of them (HTTP ranges)")
    if len(content) < length:
        raise OSError(f"{len(content):,} of {length:,} bytes arrived")
    return content


def pixel_digest(image: Image.Image) -> str:
    """Digest of an image's size and pixels."""
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()


def write_digests(folder: Path, number: int, digests: Sequence[str]) -> None:
    """Keeps the digests of the images of one validation row group."""
    (folder / DIGESTS).mkdir(exist_ok=True)
    write_atomic(folder / DIGESTS / f"{number:05d}.json", json.dumps(sorted(set(digests))))


def read_digests(folder: Path) -> Iterator[str]:
    """The digests of all validation images."""
    for file in sorted((folder / DIGESTS).glob("*.json")):
        yield from json.loads(file.read_text(encoding="utf-8"))

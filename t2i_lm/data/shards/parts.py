"""A split of token shards, part by part: memory-mapped, verified when first read, fetched where it is remote.

Opening a split reads the index and compares sizes of files, whatever their content; a part is opened, and its sha256
verified, when it is first read, and again when its size, modification time or inode has changed since. Where the parts
lie elsewhere (`remote.py`), it is fetched then.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from t2i_lm.data.order import Indices
from t2i_lm.data.shards.format import INDEX, STREAM, part_entries, part_folder, read_index
from t2i_lm.data.shards.remote import FETCHES, RemoteFiles
from t2i_lm.storage.hashing import file_sha256


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
        # State of each part's files when they were verified, 0 before.
        self._verified = shared_zeros(len(entries))
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


def shared_zeros(size: int) -> torch.Tensor:
    """Zeros (size,) int64 in memory that workers share; in each process's own where there is none (no /dev/shm)."""
    zeros = torch.zeros(size, dtype=torch.int64)
    with suppress(RuntimeError):
        zeros.share_memory_()  # type: ignore[no-untyped-call]
    return zeros


def _map(file: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()

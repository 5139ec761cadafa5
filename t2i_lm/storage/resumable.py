"""Resumable computation in part files, and atomic writes of files and folders.

Finished parts are reused after an interruption; parts of a different job are rejected.
"""

import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from t2i_lm.storage.sealed import DIGEST, read_sealed, sealed
from t2i_lm.storage.tensor_files import read_tensors, write_tensors
from t2i_lm.storage.writing import write_atomic, writing

IDENTITY = "parts.json"


class ResumableParts:
    """Files `part-00000.safetensors` of a folder, and the identity of the job that they are parts of.

    Processes may share a folder: writes are atomic, and processes that write the same file write the same content.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], items: int, size: int) -> None:
        """Opens a job; its folder is created with the first part.

        Args:
            folder: of the part files.
            identity: everything that the content depends on.
            items: number of items of the job.
            size: items per part; the last part may have fewer.

        Raises:
            ValueError: if the folder has parts of a different job, naming the differences.
        """
        self.folder, self.items, self.size = folder, items, size
        self.identity = {**identity, "items": items, "part_size": size}
        text = json.dumps(self.identity, sort_keys=True)
        self._stamp = hashlib.sha256(text.encode()).hexdigest()
        file = folder / IDENTITY
        if file.is_file():
            other = read_sealed(file, f"delete {folder} to compute it again")
            names = ({**other, **self.identity}).keys() - {DIGEST}
            keys = [key for key in names if other.get(key) != self.identity.get(key)]
            if keys:
                changes = "; ".join(f"{key}={other.get(key)!r}, now {self.identity.get(key)!r}" for key in sorted(keys))
                raise ValueError(f"{folder} has parts of a different evaluation ({changes}); use another folder")

    def __len__(self) -> int:
        return -(-self.items // self.size)

    def span(self, number: int) -> range:
        """The items of a part."""
        return range(number * self.size, min(self.items, (number + 1) * self.size))

    def path(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{number:05d}.safetensors"

    def done(self, number: int) -> bool:
        """Whether a part is complete and belongs to this job; a damaged one is told, and computed again."""
        if not self.path(number).is_file():
            return False
        try:
            return read_tensors(self.path(number))[1].get("identity") == self._stamp
        except ValueError as error:
            print(f"note: {error}; it is computed again", file=sys.stderr)
            return False

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of a finished part.

        Raises:
            ValueError: if it is damaged.
        """
        return read_tensors(self.path(number))[0]

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Writes a part atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / IDENTITY).is_file():
            write_atomic(self.folder / IDENTITY, json.dumps(sealed(self.identity), indent=2, sort_keys=True) + "\n")
        write_tensors(self.path(number), tensors, {"identity": self._stamp})

    def complete(
        self, make: Callable[[range], dict[str, Tensor]], rank: int, world: int, advance: Callable[[int], None]
    ) -> None:
        """Computes this rank's missing parts; calls `advance` with the items of each part, computed or reused."""
        for number in range(rank, len(self), world):
            self.complete_one(number, make)
            advance(len(self.span(number)))

    def complete_one(self, number: int, make: Callable[[range], dict[str, Tensor]]) -> None:
        """Computes a part if it is missing."""
        if not self.done(number):
            self.write(number, make(self.span(number)))


def share(*files: Path) -> None:
    """Gives files the permissions of new ones; safetensors writes files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    for file in files:
        file.chmod(0o666 & ~mask)


def require_new_folder(out: Path) -> None:
    """Checks that `--out` is a folder that does not exist yet or is empty.

    Raises:
        ValueError: if something would be overwritten.
    """
    if out.exists() and (not out.is_dir() or any(not _is_temporary(entry, out) for entry in out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder; nothing is overwritten")


def _is_temporary(entry: Path, out: Path) -> bool:
    """Whether an entry of a folder is one that `atomic_folder` is about to fill it from."""
    return entry.name.startswith(f"{out.name}.") and entry.suffix == ".tmp"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` on success and is removed on an error.

    If `path` is already an empty folder, the files are moved into it instead.

    Raises:
        ValueError: if another process has written `path` meanwhile.
        OSError: if the folder cannot be written.
    """
    name = f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    own = path / name if path.is_dir() else path.with_name(name)
    try:
        with writing(path, own):
            own.mkdir(parents=True)
            yield own
            require_new_folder(path)
            if own.parent == path:
                for file in sorted(own.iterdir()):
                    file.rename(path / file.name)
            else:
                own.rename(path)
    finally:
        shutil.rmtree(own, ignore_errors=True)

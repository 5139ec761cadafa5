"""Long work in parts, each a file: what a kill has left is taken up, what belongs to other work is refused.

And files and folders that appear whole or not at all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

IDENTITY = "parts.json"


class ResumableParts:
    """Files `part-00000.safetensors` of one folder, and what they are parts of.

    Several processes may share a folder: every file appears whole or not at all, and two that write the same one write
    the same content.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], items: int, size: int) -> None:
        """Names the work; the folder is made with the first part.

        Args:
            folder: where the files go.
            identity: what the content depends on.
            items: how many there are in all.
            size: items of a part; the last may have fewer.

        Raises:
            ValueError: if the folder holds parts of other work, naming what differs.
        """
        self.folder, self.items, self.size = folder, items, size
        self.identity = {**identity, "items": items, "part_size": size}
        text = json.dumps(self.identity, sort_keys=True)
        self._stamp = hashlib.sha256(text.encode()).hexdigest()
        file = folder / IDENTITY
        if file.is_file():
            found = json.loads(file.read_text())
            keys = [key for key in {**found, **self.identity} if found.get(key) != self.identity.get(key)]
            if keys:
                said = "; ".join(f"{key}={found.get(key)!r}, now {self.identity.get(key)!r}" for key in sorted(keys))
                raise ValueError(f"{folder} holds parts of another evaluation ({said}); give another folder")

    def __len__(self) -> int:
        return -(-self.items // self.size)

    def span(self, number: int) -> range:
        """The items of a part."""
        return range(number * self.size, min(self.items, (number + 1) * self.size))

    def path(self, number: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{number:05d}.safetensors"

    def done(self, number: int) -> bool:
        """Whether a part is there, whole and of this work."""
        if not self.path(number).is_file():
            return False
        try:
            with safe_open(self.path(number), framework="pt") as file:
                return (file.metadata() or {}).get("identity") == self._stamp
        except (SafetensorError, OSError):  # cut short: made again
            return False

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of a part that is done."""
        return load_file(self.path(number))

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Writes a part, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / IDENTITY).is_file():
            write_atomic(self.folder / IDENTITY, json.dumps(self.identity, indent=2, sort_keys=True) + "\n")
        own = self.path(number).with_suffix(f".{os.getpid()}.tmp")
        try:
            save_file({key: value.contiguous() for key, value in tensors.items()}, own, {"identity": self._stamp})
            with own.open("rb") as file:
                os.fsync(file.fileno())
            own.replace(self.path(number))
        finally:
            own.unlink(missing_ok=True)

    def complete(
        self, make: Callable[[range], dict[str, Tensor]], rank: int, world: int, told: Callable[[int], None]
    ) -> None:
        """Makes the missing parts of one rank of several; `told` hears the items of each, made or found."""
        for number in range(rank, len(self), world):
            self.complete_one(number, make)
            told(len(self.span(number)))

    def complete_one(self, number: int, make: Callable[[range], dict[str, Tensor]]) -> None:
        """Makes one part, if it is missing."""
        if not self.done(number):
            self.write(number, make(self.span(number)))


def write_atomic(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    own = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    own.write_text(text, encoding="utf-8")
    own.replace(path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write files into, which becomes `path` at the end; after an error nothing of it is left.

    Where `path` is an empty folder already, it is kept, and the files move into it at the end.

    Raises:
        OSError: if it cannot be made.
    """
    name = f"{path.name}.{os.getpid()}.tmp"
    own = path / name if path.is_dir() else path.with_name(name)
    try:
        own.mkdir(parents=True)
        yield own
        if own.parent == path:
            for file in sorted(own.iterdir()):
                file.rename(path / file.name)
        else:
            own.rename(path)
    finally:
        shutil.rmtree(own, ignore_errors=True)

"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is written to a temporary file in the same folder and synced; then the digest of the intended bytes is
written to `NAME.sha256`, and only then is the file renamed. A checkpoint whose bytes match no line of its digest file
counts as missing. Lightning's own writer goes through TMPDIR; on another file system that is a copy, which a kill can
truncate.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import CheckpointIO
from torch.serialization import get_unsafe_globals_in_checkpoint

from callbacks.base.interval_sums import distributed
from callbacks.files.atomic import PARTIAL_SUFFIX, write_atomic

SUFFIX, DIGEST_SUFFIX = ".ckpt", ".sha256"
# Seconds in which a network file system may show another machine's file.
VISIBLE_S = 10.0


class CorruptCheckpointError(ValueError):
    """A checkpoint whose bytes differ from those that were saved."""


class DurableCheckpointIO(CheckpointIO):
    """Atomic, verified checkpoints, readable with `weights_only=True`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes a checkpoint and its digest.

        Raises:
            OSError: if the disk is full or not writable; earlier checkpoints are untouched.
            TypeError: if the checkpoint holds an object that `weights_only=True` refuses.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + PARTIAL_SUFFIX)
        try:
            digest = _write_hashed(checkpoint, partial)
            if unsafe := get_unsafe_globals_in_checkpoint(partial):
                raise TypeError(
                    f"{target.name} would not be readable with weights_only=True: it holds {', '.join(unsafe)}. "
                    "The state of modules and callbacks must consist of tensors, numbers, strings, lists and dicts"
                )
            # The second line is the digest of an older file of this name, which stays valid until the rename.
            lines = [f"{known}  {target.name}\n" for known in (digest, *digests(target)[:1])]
            write_atomic(digest_of(target), "".join(lines).encode("ascii"))
            partial.replace(target)
            _sync_folder(target.parent)
        except OSError as error:
            raise OSError(
                f"could not write checkpoint {target}: {error}. Check free space and permissions in {target.parent}; "
                "earlier checkpoints are intact"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Reads a checkpoint after checking its digest, always with `weights_only=True`, so that it runs no code.

        With several ranks, all read the checkpoint that rank 0 names; every rank must call it, and those others may
        pass its folder as `path`.

        Raises:
            CorruptCheckpointError: before any tensor is read; on every rank, if one finds another file or none.
        """
        path = agree(Path(path))
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)  # type: ignore[no-any-return]

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Deletes a checkpoint and its digest.

        Raises:
            OSError: if the checkpoint cannot be deleted; its digest then stays.
        """
        Path(path).unlink(missing_ok=True)
        digest_of(Path(path)).unlink(missing_ok=True)


def digest_of(path: Path) -> Path:
    """The file beside a checkpoint with its sha256, in the format of `sha256sum`."""
    return path.with_name(path.name + DIGEST_SUFFIX)


def digests(path: Path) -> list[str]:
    """The valid digests of a checkpoint."""
    beside = digest_of(path)
    lines = beside.read_text(encoding="ascii", errors="replace").splitlines() if beside.is_file() else []
    return [line.split()[0] for line in lines if line.split()]


def verify(path: Path) -> str:
    """Checks a checkpoint against its digest, and returns that.

    Raises:
        CorruptCheckpointError: if either file is missing or they do not match.
    """
    if not path.is_file():
        raise CorruptCheckpointError(f"no checkpoint at {path}")
    known = digests(path)
    if not known:
        raise CorruptCheckpointError(
            f"{path} has no digest in {digest_of(path).name}: it was not written by this suite"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found not in known:
        raise CorruptCheckpointError(f"{path} is damaged: its bytes do not match {digest_of(path).name}")
    return found


def agree(path: Path) -> Path:
    """The checkpoint that rank 0 passed as `path`, verified to be the same bytes on every rank.

    A rank on another machine may not see a new file at once, which is why none chooses by itself.

    Raises:
        CorruptCheckpointError: on every rank, naming the ranks that cannot read it.
    """
    if not distributed():
        verify(path)
        return path
    rank = dist.get_rank()
    mine = [_found(path) if rank == 0 else None]
    dist.broadcast_object_list(mine, src=0)
    assert mine[0] is not None
    name, digest, problem = mine[0]
    path = (path if path.is_dir() else path.parent) / name
    if rank > 0 and problem is None:
        deadline = time.monotonic() + VISIBLE_S
        while not path.is_file() and time.monotonic() < deadline:
            time.sleep(0.5)
        _, found, problem = _found(path)
        if problem is None and found != digest:
            problem = f"{path} is another file than on rank 0"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if first := next((one for one in problems if one is not None), None):
        ranks = ", ".join(str(number) for number, one in enumerate(problems) if one is not None)
        raise CorruptCheckpointError(f"rank {ranks}: {first}; all ranks stop")
    return path


def _found(path: Path) -> tuple[str, str, str | None]:
    """Name, digest and problem of a checkpoint."""
    try:
        return path.name, verify(path), None
    except (CorruptCheckpointError, OSError) as error:
        return path.name, "", str(error)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files of killed saves, and digests without a checkpoint."""
    orphans = [path for path in folder.glob(f"*{SUFFIX}{DIGEST_SUFFIX}") if not path.with_suffix("").is_file()]
    return [*folder.glob(f"*{SUFFIX}*{PARTIAL_SUFFIX}"), *orphans]


class _HashingFile:
    """A file that hashes the bytes before they are written, so that damage on the way to the disk is detected."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                # Raised after torch's writer returns: a Python error must not unwind its C++ code.
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def _write_hashed(checkpoint: dict[str, Any], path: Path) -> str:
    """Writes and syncs a file; returns the sha256 of the intended bytes."""
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        torch.save(checkpoint, hashing)  # type: ignore[arg-type]  # uses write and flush only
        if hashing.error is not None:
            raise hashing.error
        file.flush()
        os.fsync(file.fileno())
    return hashing.sha256.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

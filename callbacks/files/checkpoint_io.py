"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is written to a temporary file in the same folder and synced; then the digest of the intended bytes is
written to `NAME.sha256`, and only then is the file renamed. A checkpoint whose bytes match no line of its digest file
counts as missing. Lightning's own writer goes through TMPDIR; on another file system that is a copy, which a kill can
truncate.
"""

import hashlib
import os
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch.serialization import get_unsafe_globals_in_checkpoint

from callbacks.files.atomic import PARTIAL_SUFFIX, write_atomic

SUFFIX, DIGEST_SUFFIX = ".ckpt", ".sha256"


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

        Raises:
            CorruptCheckpointError: before any tensor is read.
        """
        verify(Path(path))
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)  # type: ignore[no-any-return]

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Deletes a checkpoint and its digest."""
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


def verify(path: Path) -> None:
    """Checks a checkpoint against its digest.

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
        if hashlib.file_digest(file, "sha256").hexdigest() not in known:
            raise CorruptCheckpointError(f"{path} is damaged: its bytes do not match {digest_of(path).name}")


def sweep(folder: Path) -> int:
    """Removes temporary files of killed saves, and digests without a checkpoint; returns the number of files."""
    stale = list(folder.glob(f"*{SUFFIX}*{PARTIAL_SUFFIX}"))
    stale += [path for path in folder.glob(f"*{SUFFIX}{DIGEST_SUFFIX}") if not path.with_suffix("").is_file()]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


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

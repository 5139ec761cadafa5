"""Checkpoints that survive a kill, a full disk and a flipped bit.

Written to a temporary file in the same folder, synced, renamed, and only then given a `.sha256`; a checkpoint
without a matching digest counts as absent. Lightning's own writer goes through TMPDIR, which on another file
system is a copy that a kill can cut short.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

SUFFIX = ".ckpt"


class CorruptCheckpointError(ValueError):
    """A checkpoint whose bytes are not those that were saved."""


class DurableCheckpointIO(CheckpointIO):
    """Atomic, verified checkpoints, readable with `weights_only=True`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes a checkpoint and its digest.

        Raises:
            OSError: if the disk is full or not writable; earlier checkpoints are untouched.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.tmp")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            digest = _sha256(partial)
            digest_of(target).unlink(missing_ok=True)
            partial.replace(target)
            _write_synced(digest_of(target), digest)
            _sync_folder(target.parent)
        except (OSError, RuntimeError) as error:
            # torch reports a failed write of its zip as a RuntimeError.
            partial.unlink(missing_ok=True)
            raise OSError(
                f"could not write checkpoint {target}: {error}. Free space or permission in {target.parent}; "
                "earlier checkpoints are intact"
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Reads a checkpoint after checking its digest.

        Raises:
            CorruptCheckpointError: before any tensor is read.
        """
        verify(Path(path))
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)  # type: ignore[no-any-return]

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Deletes a checkpoint and its digest."""
        digest_of(Path(path)).unlink(missing_ok=True)
        Path(path).unlink(missing_ok=True)


def digest_of(path: Path) -> Path:
    """The file beside a checkpoint that holds its sha256."""
    return path.with_name(f"{path.name}.sha256")


def verify(path: Path) -> None:
    """Checks a checkpoint against its digest.

    Raises:
        CorruptCheckpointError: if either file is missing or they do not match.
    """
    if not path.is_file():
        raise CorruptCheckpointError(f"no checkpoint at {path}")
    if not digest_of(path).is_file():
        raise CorruptCheckpointError(f"{path} has no {digest_of(path).name}: it was never completely written")
    if _sha256(path) != digest_of(path).read_text().strip():
        raise CorruptCheckpointError(f"{path} is damaged: its bytes do not match {digest_of(path).name}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

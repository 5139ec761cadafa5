"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is written to a temporary file in the same folder and synced; then the digest of the intended bytes is
written to `NAME.sha256`, and only then is the file renamed. A checkpoint whose bytes match no line of its digest file
counts as missing. Lightning's own writer goes through TMPDIR; on another file system that is a copy, which a kill can
truncate.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from callbacks.base.interval_sums import distributed
from callbacks.files.atomic import PARTIAL_SUFFIX, write_atomic
from callbacks.files.checkpoint_parts import (
    INFIX,
    PARTS,
    ShardIndex,
    needed_parts,
    part_files,
    part_name,
    parts_of,
    read_checkpoint,
)
from callbacks.files.disk import named

SUFFIX, DIGEST_SUFFIX = ".ckpt", ".sha256"
# Seconds in which a network file system may show another machine's file.
VISIBLE_S = 10.0
# Bytes that are hashed, and written while they are in the processor's cache.
BLOCK = 2**23


class CorruptCheckpointError(ValueError):
    """A checkpoint whose bytes differ from those that were saved."""


class DurableCheckpointIO(CheckpointIO):
    """Atomic, verified checkpoints, readable with `weights_only=True`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes a checkpoint and its digest; a function given as `storage_options` gets both instead.

        Raises:
            OSError: if the disk is full or not writable; earlier checkpoints are untouched.
            TypeError: if the checkpoint holds an object that `weights_only=True` refuses.
        """
        if storage_options is not None:
            storage_options(checkpoint, Path(path))
            return
        write(checkpoint, Path(path))

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
        return read_checkpoint(path, map_location or "cpu")

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Deletes a checkpoint with its parts and its digest.

        Raises:
            OSError: if the checkpoint cannot be deleted; its digest then stays.
        """
        parts = part_files(Path(path))
        Path(path).unlink(missing_ok=True)
        for part in parts:
            part.unlink(missing_ok=True)
        digest_of(Path(path)).unlink(missing_ok=True)


def write(content: dict[str, Any], target: Path) -> None:
    """Writes a file and its digest, as `DurableCheckpointIO.save_checkpoint`."""

    def publish(partial: Path, digest: str) -> None:
        # The second line is the digest of an older file of this name, which stays valid until the rename.
        lines = [f"{known}  {target.name}\n" for known in (digest, *digests(target)[:1])]
        lines += [f"{known}  {name}\n" for name, known in content.get(PARTS, ())]
        write_atomic(digest_of(target), "".join(lines).encode("ascii"))
        partial.replace(target)
        _sync_folder(target.parent)

    _write(content, target, publish)


def write_part(rows: list[Tensor], path: Path, index: int, count: int) -> tuple[str, str]:
    """Writes a part of the checkpoint `path`; its name and digest.

    Raises:
        OSError: if the disk is full or not writable.
    """
    found: list[tuple[str, str]] = []

    def publish(partial: Path, digest: str) -> None:
        found.append((part_name(path, index, count, digest), digest))
        partial.replace(path.with_name(found[0][0]))
        _sync_folder(path.parent)

    _write({"rows": rows}, path.with_name(part_name(path, index, count)), publish)
    return found[0]


def _write(content: dict[str, Any], target: Path, publish: Callable[[Path, str], None]) -> None:
    """Writes a temporary file for `target`; `publish` gets it with its digest."""
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = _write_hashed(content, partial)
        if unsafe := get_unsafe_globals_in_checkpoint(partial):
            raise TypeError(
                f"{target.name} would not be readable with weights_only=True: it holds {', '.join(unsafe)}. "
                "The state of modules and callbacks must consist of tensors, numbers, strings, lists and dicts"
            )
        publish(partial, digest)
    except OSError as error:
        raise OSError(
            f"could not write checkpoint {named(error, target)}. Check permissions in {target.parent}; "
            "earlier checkpoints are intact"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def digest_of(path: Path) -> Path:
    """The file beside a checkpoint with its sha256, in the format of `sha256sum`."""
    return path.with_name(path.name + DIGEST_SUFFIX)


def digests(path: Path) -> list[str]:
    """The valid digests of a checkpoint."""
    beside = digest_of(path)
    lines = beside.read_text(encoding="ascii", errors="replace").splitlines() if beside.is_file() else []
    return [line.split()[0] for line in lines if line.split() and INFIX not in line]


def verify(path: Path, stop: Callable[[], bool] = lambda: False, shard: ShardIndex | None = None) -> str:
    """Checks a checkpoint and its parts against their digests, and returns its own.

    Args:
        path: of the checkpoint.
        stop: asked from time to time.
        shard: whose parts alone are checked; None for all parts.

    Raises:
        CorruptCheckpointError: if a file is missing or does not match.
        InterruptedError: if `stop` says so.
    """
    if not path.is_file():
        raise CorruptCheckpointError(f"no checkpoint at {path}")
    known = digests(path)
    if not known:
        raise CorruptCheckpointError(
            f"{path} has no digest in {digest_of(path).name}: it was not written by this suite"
        )
    found = _hashed(path, stop)
    if found not in known:
        raise CorruptCheckpointError(f"{path} is damaged: its bytes do not match {digest_of(path).name}")
    if part_files(path) or INFIX in digest_of(path).read_text(encoding="ascii", errors="replace"):
        for name, digest in parts_of(path) if shard is None else needed_parts(path, shard):
            part = path.with_name(name)
            if not part.is_file():
                raise CorruptCheckpointError(f"{path} is incomplete: {name} is missing")
            if _hashed(part, stop) != digest:
                raise CorruptCheckpointError(f"{path} is damaged: the bytes of {name} do not match its digest")
    return found


def _hashed(path: Path, stop: Callable[[], bool]) -> str:
    sha256, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            sha256.update(block[:size])
            if stop():
                raise InterruptedError(f"{path} was not read to its end")
    return sha256.hexdigest()


def forget_cached(path: Path) -> None:
    """Drops synced files from the page cache where the system can, so that reading them back reads the disk."""
    if hasattr(os, "posix_fadvise"):
        for one in (path, *part_files(path)):
            with one.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def agree(path: Path, shard: ShardIndex | None = None) -> Path:
    """The checkpoint that rank 0 passed as `path`, verified to be the same bytes on every rank.

    A rank on another machine may not see a new file at once, which is why none chooses by itself. Rank 0 verifies
    the whole checkpoint (in `find_resumable`); with `shard`, the others read and verify only the parts with their rows.

    Raises:
        CorruptCheckpointError: on every rank, naming the ranks that cannot read it.
    """
    if not distributed():
        verify(path, shard=shard)
        return path
    rank = dist.get_rank()
    mine = [_found(path, shard) if rank == 0 else None]
    dist.broadcast_object_list(mine, src=0)
    assert mine[0] is not None
    name, digest, problem = mine[0]
    path = (path if path.is_dir() else path.parent) / name
    if rank > 0 and problem is None:
        await_visible(path)
        _, found, problem = _found(path, shard)
        if problem is None and found != digest:
            problem = f"{path} is another file than on rank 0"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if first := next((one for one in problems if one is not None), None):
        ranks = ", ".join(str(number) for number, one in enumerate(problems) if one is not None)
        raise CorruptCheckpointError(f"rank {ranks}: {first}; all ranks stop")
    return path


def await_visible(*paths: Path) -> list[Path]:
    """Waits until files that other ranks have written can be seen; those that cannot."""
    deadline = time.monotonic() + VISIBLE_S
    while missing := [path for path in paths if not path.is_file()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return missing


def _found(path: Path, shard: ShardIndex | None) -> tuple[str, str, str | None]:
    """Name, digest and problem of a checkpoint."""
    try:
        return path.name, verify(path, shard=shard), None
    except (CorruptCheckpointError, OSError) as error:
        return path.name, "", str(error)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files of killed saves, digests without a checkpoint, and parts that none lists."""
    orphans = [path for path in folder.glob(f"*{SUFFIX}{DIGEST_SUFFIX}") if not path.with_suffix("").is_file()]
    temporary = [*folder.glob(f"*{SUFFIX}*{PARTIAL_SUFFIX}")]
    parts = {path for path in folder.glob(f"*{SUFFIX}{INFIX}*") if path not in temporary}
    for main in {path.with_name(path.name.split(INFIX)[0]) for path in parts}:
        if main.is_file():
            try:
                parts -= {main.with_name(name) for name, _ in parts_of(main)}
            except Exception:  # a damaged file, whose parts stay with it
                parts -= set(part_files(main))
    return [*temporary, *orphans, *sorted(parts)]


class _HashingFile:
    """A file that hashes the bytes before they are written, so that damage on the way to the disk is detected."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:  # else the file is lost
            try:
                for start in range(0, len(data), BLOCK):
                    block = data[start : start + BLOCK]
                    self.sha256.update(block)
                    self.file.write(block)
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
    """Syncs a rename, where the file system can: some shared ones, such as CIFS, sync files alone."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)

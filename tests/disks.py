"""Disks that are full: by a limit on the size of a file, without privileges, or a small file system."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes; the write that would takes what fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, mebibytes: float) -> Iterator[Path]:
    """A file system of its own in memory; skips the test where none may be mounted."""
    folder.mkdir(exist_ok=True)
    size = f"size={int(mebibytes * 1024)}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system may be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Ballast:
    """A file that fills a disk up to some bytes; in pages of 4096 bytes, as the file system counts them."""

    def __init__(self, disk: Path) -> None:
        self.file = disk / "ballast"

    def fill(self, left: int = 0) -> None:
        """Takes all space but `left` bytes."""
        with suppress(OSError), self.file.open("ab", buffering=0) as file:
            while file.write(bytes(2**16)):
                pass
        with self.file.open("ab") as file:
            file.truncate(max(0, file.tell() - left))

    def remove(self) -> None:
        """Gives it back."""
        self.file.unlink(missing_ok=True)

"""The boundary at which a file is written: it becomes whole or stays as it was, and errors of the disk name it."""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from t2i_lm.storage.reading import FULL, reason

# A full disk; a read-only file system and a failing disk.
DISK_ERRORS = (*FULL, errno.EROFS, errno.EIO)
# Below this much free space a file system counts as full where no file is named.
NEARLY_FULL = 2**20
_NUMBER = re.compile(r"\(os error (\d+)\)")


class DiskError(OSError):
    """A file that cannot be written: `PATH: No space left on device (3.1 MB free)`."""

    @classmethod
    def of(cls, error: OSError, path: Path) -> Self:
        """An error as one of `path`."""
        return cls(error.errno, error.strerror, str(path))

    def __str__(self) -> str:
        path = Path(os.fsdecode(self.filename))
        return f"{path}: {self.strerror}{free_space(path) if self.errno in FULL else ''}"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path` that replaces it on success; after an error, `path` is as it was.

    A link is replaced, not followed; a device such as /dev/stdout is written directly.

    Raises:
        OSError: if it cannot be written, naming `path`.
    """
    if path.exists() and not path.is_file():
        with writing(path):
            yield path
        return
    # Containers on several machines may have equal process ids.
    own = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        with writing(path, own):
            yield own
            own.replace(path)
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: other processes see the old or the new content.

    Raises:
        OSError: if it cannot be written, naming `path`.
    """
    with atomic_file(path) as own:
        own.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(path: Path, own: Path | None = None) -> Iterator[None]:
    """Names `path` in errors of the disk inside, also in those of libraries that have types of their own.

    Args:
        path: the file or folder.
        own: the temporary file or folder that becomes `path`.

    Raises:
        DiskError: naming the file.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _number(error)
        if number is None:
            raise
        file = getattr(error, "filename", None)
        found = None if file is None else Path(os.fsdecode(file))
        if found is not None and own is not None and found.is_relative_to(own):
            found = path / found.relative_to(own)
        elif isinstance(error, DiskError) or number not in DISK_ERRORS:
            raise
        raise DiskError(number, os.strerror(number), str(found or path)) from error


def _number(error: Exception) -> int | None:
    """The number of the operating system's error in the message of a library in Rust, such as safetensors."""
    found = _NUMBER.search(str(error))
    return int(found[1]) if found and int(found[1]) in DISK_ERRORS else None


def problem(error: BaseException) -> str:
    """An error in one line; of a disk with path and free space, or with the full file systems if it names no file."""
    if not is_disk_error(error):
        return reason(error)
    assert isinstance(error, OSError)
    if error.filename is not None:
        return str(DiskError(error.errno, error.strerror, error.filename))
    places = sorted({".", os.environ.get("TMPDIR", "/tmp"), os.environ.get("HOME", "/")})
    full = [place for place in map(Path, places) if (free := _free(place)) is not None and free < NEARLY_FULL]
    return ": ".join([str(error.strerror), *[f"{place}{free_space(place)}" for place in full]])


def is_disk_error(error: BaseException) -> bool:
    """Whether the disk is full, read-only or fails, or a file could not be written for another reason."""
    return isinstance(error, OSError) and (error.errno in DISK_ERRORS or isinstance(error, DiskError))


def free_space(path: Path) -> str:
    """` (3.1 MB free)` of the file system of a path; empty if unknown."""
    free = _free(path)
    return "" if free is None else f" ({free / 1e6:,.1f} MB free)"


def _free(path: Path) -> int | None:
    """Free bytes where a path is or would be; 0 where no file can be added."""
    for place in (path, *path.absolute().parents):
        with suppress(OSError):
            found = os.statvfs(place)
            no_files = found.f_files > 0 and found.f_favail == 0
            return 0 if no_files else found.f_bavail * found.f_frsize
    return None

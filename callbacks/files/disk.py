"""Errors of a disk in one line; as `t2i_lm.storage.writing` tells them, without Lightning."""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

# A full disk, an exhausted quota, a limit on the size of a file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskError(OSError):
    """A file that cannot be written: `PATH: No space left on device (3.1 MB free)`."""

    def __str__(self) -> str:
        path = Path(os.fsdecode(self.filename))
        return f"{path}: {self.strerror}{free_space(path) if self.errno in FULL else ''}"


def named(error: OSError, path: Path) -> OSError:
    """The error as one of `path`."""
    return DiskError(error.errno, error.strerror, str(path)) if error.errno else error


def free_space(path: Path) -> str:
    """` (3.1 MB free)` of the file system of a path; empty if unknown."""
    for place in (path, *path.absolute().parents):
        with suppress(OSError):
            found = os.statvfs(place)
            no_files = found.f_files > 0 and found.f_favail == 0
            return f" ({0 if no_files else found.f_bavail * found.f_frsize / 1e6:,.1f} MB free)"
    return ""


def tell(text: str) -> None:
    """Prints a line on stderr, which may lie on the full disk itself."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)

"""Atomic and durable file writes."""

import os
from contextlib import suppress
from pathlib import Path

from callbacks.files.disk import named

PARTIAL_SUFFIX = ".tmp"


def write_atomic(path: Path, content: bytes) -> None:
    """Writes and syncs a temporary file beside `path`, then renames it: a kill leaves the old or the new content.

    Raises:
        OSError: naming `path`, which is then as it was.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise named(error, path) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)

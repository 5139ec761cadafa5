"""Atomic and durable file writes."""

import os
from pathlib import Path

PARTIAL_SUFFIX = ".tmp"


def write_atomic(path: Path, content: bytes) -> None:
    """Writes and syncs a temporary file beside `path`, then renames it: a kill leaves the old or the new content."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

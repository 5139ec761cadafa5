"""Tar files as img2dataset writes them."""

import io
import tarfile
from pathlib import Path


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """Samples by key, each a file's bytes by suffix."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                entry = tarfile.TarInfo(f"{key}{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path

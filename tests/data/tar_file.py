"""Writer of tar files in the format of img2dataset."""

import io
import tarfile
from pathlib import Path


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """Writes `samples`: by key, the content of each file by suffix."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                entry = tarfile.TarInfo(f"{key}{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path

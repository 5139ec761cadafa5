"""SHA-256 of files and folders."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from t2i_lm.storage.reading import require_regular


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """Hash of a file's bytes, computed once per process while its size, times and inode stay."""
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@lru_cache(maxsize=1024)
def _sha256_of(path: Path, *state: int) -> str:
    return file_sha256(path)


def folder_sha256(folder: Path, suffixes: Sequence[str]) -> str:
    """Hash of the names and bytes of all files below a folder with one of the `suffixes`."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in suffixes and file.is_file())
    return files_sha256(files, folder)


def files_sha256(files: Sequence[Path], folder: Path | None = None) -> str:
    """Hash of the names and bytes of several files; of paths below `folder` where it is given."""
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(folder).as_posix() if folder else file.name
        digest.update(f"{name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


# Suffixes of weights in a model's folder.
WEIGHTS = (".safetensors", ".pt", ".bin")


def weights_sha256(path: Path) -> dict[str, str]:
    """Hash by name of a weights file, or of all weights files in a folder."""
    files = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS) if path.is_dir() else [path]
    return {file.name: known_sha256(file) for file in files}

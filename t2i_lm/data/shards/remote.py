"""Token shards at another place: any URL that fsspec opens, such as `hf://datasets/ORG/NAME`, `s3://` or `https://`.

Their index is copied to a folder of `data.cache_dir`. A file is fetched when it is first read, by one process of a
machine, verified, and kept until newer ones need its place: the files take at most `data.remote_cache_gib`.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.reading import reason
from t2i_lm.storage.resumable import write_atomic

# Names where the shards of a folder lie.
REMOTE = "remote.json"
# Files that a process fetches at a time.
FETCHES = 8
# How often a fetch is tried, and the seconds before the second try, which double.
TRIES, WAIT_S = 4, 1.0


def is_url(path: str) -> bool:
    """Whether a path is an address that fsspec opens."""
    return "://" in path


@dataclass(frozen=True)
class RemoteFiles:
    """Files below a URL, and those of them that are on this machine.

    Attributes:
        folder: where they are kept, by sha256.
        url: where they lie.
        limit: most bytes that are kept.
    """

    folder: str
    url: str
    limit: int

    @classmethod
    def of(cls, folder: Path) -> "RemoteFiles | None":
        """Those that a folder of shards refers to; None if it holds its shards itself."""
        file = folder / REMOTE
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def write(self, folder: Path) -> None:
        """Makes a folder of shards refer to these."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        write_atomic(folder / REMOTE, json.dumps(asdict(self), indent=2) + "\n")

    def has(self, sha256: str) -> bool:
        """Whether a file is on this machine."""
        return Path(self.folder, sha256).exists()

    def fetch(self, name: str, sha256: str, verified: bool) -> Path:
        """A file on this machine; a kept one is verified unless it has been, and replaced if it is damaged.

        Raises:
            ValueError: if it cannot be fetched, naming its URL.
        """
        target = Path(self.folder, sha256)
        if verified and _touch(target):
            return target
        with FileLock(Path(self.folder, f"{sha256[:2]}.lock")):  # other processes wait for the one that fetches
            if not (_touch(target) and file_sha256(target) == sha256):
                self._download(name, target, sha256)
        return target

    def _download(self, name: str, target: Path, sha256: str) -> None:
        url, own = f"{self.url}/{name}", target.with_suffix(".tmp")
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(WAIT_S * 2 ** (attempt - 1))
            try:
                download(url, own)
                found = file_sha256(own)
            except ImportError as error:  # of the protocol's package
                raise ValueError(f"{url}: {reason(error)}") from error
            except Exception as error:  # whatever a protocol's client raises
                problem = f"cannot be fetched: {reason(error)}"
                continue
            if found == sha256:
                own.replace(target)
                self._make_room()
                return
            problem = f"is damaged: its sha256 is {found}, index.json says {sha256}"
        own.unlink(missing_ok=True)
        raise ValueError(
            f"token shard {url} {problem} ({TRIES} tries); --resume continues the run from its last checkpoint"
        )

    def _make_room(self) -> None:
        """Deletes the files that were opened longest ago. Processes that have one mapped read on."""
        files = sorted(_files(self.folder), reverse=True)
        kept = 0
        for number, (_, size, path) in enumerate(files):
            kept += size
            if kept > self.limit and number:  # never the newest
                Path(path).unlink(missing_ok=True)


def download(url: str, target: Path) -> None:
    """Copies the file at a URL. Raises what its protocol's client raises."""
    import fsspec

    files, path = fsspec.core.url_to_fs(url)
    files.get_file(path, str(target))


def read_remote_index(url: str) -> dict[str, Any]:
    """The index of the shards at a URL.

    Raises:
        ValueError: naming the URL, if it cannot be read.
    """
    import fsspec

    file = f"{url}/index.json"
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT_S * 2 ** (attempt - 1))
        try:
            files, path = fsspec.core.url_to_fs(file)
            index = json.loads(files.cat_file(path))
            break
        except (ImportError, FileNotFoundError, ValueError) as error:  # of no protocol, of no file, of no JSON
            raise ValueError(f"data.path={url}: index.json cannot be read: {reason(error)}") from error
        except Exception as error:  # whatever a protocol's client raises
            problem = error
    else:
        raise ValueError(f"data.path={url}: index.json cannot be read: {reason(problem)}") from problem
    if not isinstance(index, dict) or "splits" not in index:
        raise ValueError(f"data.path={url}: index.json is no index of token shards")
    return index


def _touch(path: Path) -> bool:
    """Marks a file as used; whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _files(folder: str) -> Iterator[tuple[int, int, str]]:
    """Time, size and path of the files that are kept."""
    for entry in os.scandir(folder):
        if len(entry.name) == 64:
            try:
                status = entry.stat()
            except FileNotFoundError:  # deleted by another process
                continue
            yield status.st_mtime_ns, status.st_size, entry.path

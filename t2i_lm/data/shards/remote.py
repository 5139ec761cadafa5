"""Token shards at another place: any URL that fsspec opens, such as `hf://datasets/ORG/NAME`, `s3://` or `https://`.

Their index is copied to a folder of `data.cache_dir`. A file is fetched when it is first read, by one process of a
machine, verified, and kept until newer ones need its place: the files take at most `data.remote_cache_gib`.
"""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.reading import FULL, reason
from t2i_lm.storage.sealed import opened
from t2i_lm.storage.writing import problem as told
from t2i_lm.storage.writing import write_atomic, writing

# Names where the shards of a folder lie.
REMOTE = "remote.json"
# Files that a process fetches at a time.
FETCHES = 8
# How often a fetch is tried, and the seconds before the second try, which double.
TRIES, WAIT_S = 4, 1.0
# Where credentials come from, by protocol.
LOGINS = {
    "hf": "hf auth login, or HF_TOKEN",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    **dict.fromkeys(("gs", "gcs"), "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS"),
    **dict.fromkeys(("abfs", "abfss", "az"), "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and _KEY"),
}
RESUMES = "--resume continues the run from its last checkpoint"
T = TypeVar("T")


class RemoteError(ValueError):
    """What is wrong with a remote file: `cannot be read: ...` or `is damaged: ...`, to follow its name."""


class DamagedError(Exception):
    """A file that arrived damaged."""


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
        if verified and touch(target):
            return target
        with FileLock(Path(self.folder, f"{sha256[:2]}.lock")):  # other processes wait for the one that fetches
            if not (touch(target) and file_sha256(target) == sha256):
                self._download(name, target, sha256)
        return target

    def _download(self, name: str, target: Path, sha256: str) -> None:
        url, own = f"{self.url}/{name}", target.with_suffix(".tmp")

        def attempt() -> None:
            files, path = open_place(url)
            with writing(own):
                files.get_file(path, str(own))
            if (found := file_sha256(own)) != sha256:
                raise DamagedError(f"is damaged: its sha256 is {found}, index.json says {sha256}")

        try:
            persistently(attempt, url)
        except RemoteError as error:
            own.unlink(missing_ok=True)
            raise ValueError(f"token shard {url} {error}; {RESUMES}") from error
        own.replace(target)
        make_room(self.folder, self.limit)


def read_remote_index(url: str) -> dict[str, Any]:
    """The index of the shards at a URL.

    Raises:
        ValueError: naming the URL, if it cannot be read.
    """
    file = f"{url}/index.json"

    def attempt() -> bytes:
        files, path = open_place(file)
        content: bytes = files.cat_file(path)
        return content

    try:
        text = persistently(attempt, file)
    except RemoteError as error:
        raise ValueError(f"data.path={url}: index.json {error}") from error
    index = opened(text, f"data.path={url}: index.json", "copy it again from where the shards were prepared")
    if not isinstance(index.get("splits"), dict):
        raise ValueError(f"data.path={url}: index.json is no index of token shards")
    return index


def open_place(url: str) -> tuple[Any, str]:
    """The file system of a URL, or of a path of this machine, and the path in it.

    Raises:
        RemoteError: if its protocol is unknown, or the protocol's package is not installed.
    """
    import fsspec
    from fsspec.registry import known_implementations

    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        known = known_implementations.get(url.partition("://")[0], {}).get("class", "").partition(".")[0]
        package = f"requires {known}, which is not installed: pip install {known}"
        raise RemoteError(f"cannot be read: {reason(error) if known in ('', 'fsspec') else package}") from error
    except ValueError as error:
        raise RemoteError(f"cannot be read: {reason(error)}") from error
    return files, path


def persistently(attempt: Callable[[], T], url: str) -> T:
    """What an attempt to read a URL returns; it is made again, `TRIES` times in all, where that may help.

    Raises:
        RemoteError: on what is wrong with the URL, in one line without it.
    """
    problem: Exception = RemoteError("")
    for number in range(TRIES):
        if number:
            time.sleep(WAIT_S * 2 ** (number - 1))
        try:
            return attempt()
        except RemoteError:
            raise
        except DamagedError as error:
            problem = error
        except Exception as error:  # whatever a protocol's client raises
            problem = error
            if (final := _final(error, url)) is not None:
                raise RemoteError(f"cannot be read: {final}") from error
    text = str(problem) if isinstance(problem, DamagedError) else f"cannot be read: {reason(problem)}"
    raise RemoteError(f"{text} ({TRIES} tries)") from problem


def _final(error: Exception, url: str) -> str | None:
    """What is wrong, where another try cannot help: a file or credentials that are missing, a disk that is full."""
    name, protocol = type(error).__name__, url.partition("://")[0]
    login = LOGINS.get(protocol, "those that its fsspec package reads")
    if isinstance(error, OSError) and error.errno in (*FULL, errno.EROFS):
        return f"no room to keep it: {told(error)}"
    if isinstance(error, FileNotFoundError):
        private = f"; a private one requires credentials: {login}" if protocol in LOGINS else ""
        return f"{reason(error)}{private}"
    status = getattr(error, "status", getattr(getattr(error, "response", None), "status_code", None))
    if isinstance(error, PermissionError) or "Credential" in name or "Gated" in name or status in (401, 403):
        return f"access is denied ({reason(error)}); it requires credentials: {login}"
    return None


def make_room(folder: str | Path, limit: int) -> None:
    """Deletes the files of a folder that were opened longest ago, until the others take at most `limit` bytes.

    Never the newest one; processes that have one mapped read on.
    """
    files = sorted(_files(folder), reverse=True)
    kept = 0
    for number, (_, size, path) in enumerate(files):
        kept += size
        if kept > limit and number:
            Path(path).unlink(missing_ok=True)


def touch(path: Path) -> bool:
    """Marks a file as used, by the time of access: that of modification tells of damage. Whether it is there."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _files(folder: str | Path) -> Iterator[tuple[int, int, str]]:
    """Time of last use, size and path of the files that are kept."""
    for entry in os.scandir(folder):
        if not entry.name.endswith(".lock") and ".tmp" not in entry.name:  # whose writer has not ended
            try:
                status = entry.stat()
            except FileNotFoundError:  # deleted by another process
                continue
            yield status.st_atime_ns, status.st_size, entry.path

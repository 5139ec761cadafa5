"""Files of the Hugging Face hub by name: `hub:ORG/NAME[@REVISION][/FILE][#sha256=HEX]`.

The cache is looked at first, so what was fetched once works offline. Without a file, the whole repository is meant.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from t2i_lm.storage.hashing import file_sha256

PREFIX = "hub:"
_FORM = re.compile(
    r"hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>[^#]+))?(#sha256=(?P<sha256>[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class HubFile:
    """A file, or with `file` None all files, of a repository on the hub."""

    repo: str
    revision: str | None
    file: str | None
    sha256: str | None

    @property
    def command(self) -> str:
        """The shell command that fetches it into the cache."""
        parts = ["hf download", self.repo, self.file or "", f"--revision {self.revision}" if self.revision else ""]
        return " ".join(part for part in parts if part)


def parse(reference: str) -> HubFile:
    """Reads a `hub:` reference.

    Raises:
        ValueError: if it has another form.
    """
    found = _FORM.fullmatch(reference)
    if found is None:
        raise ValueError(f"{reference}: expected hub:ORG/NAME[@REVISION][/FILE][#sha256=64 hexadecimal digits]")
    if found["sha256"] and not found["file"]:
        raise ValueError(f"{reference}: a sha256 needs a file")
    return HubFile(found["repo"], found["revision"], found["file"], found["sha256"])


def cached(reference: str) -> Path | None:
    """Where the file lies in the cache; None if it is not there. Never uses the network."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = parse(reference)
    try:
        if wanted.file is None:
            return Path(snapshot_download(wanted.repo, revision=wanted.revision, local_files_only=True))
        return Path(hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def fetch(reference: str) -> Path:
    """The local file, or folder of a whole repository, fetched where it is not in the cache.

    Raises:
        ValueError: if it is out of reach, saying the command that gets it, or if its sha256 is another.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = parse(reference)
    # A folder in the cache may hold a single file that something else fetched: the hub is asked first for all of them.
    path = None if wanted.file is None else cached(reference)
    if path is None:
        try:
            if wanted.file is None:
                path = Path(snapshot_download(wanted.repo, revision=wanted.revision))
            else:
                path = Path(hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision))
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            path = cached(reference)
            if path is None:
                raise ValueError(
                    f"{reference} is not in the cache and cannot be fetched ({type(error).__name__}). Where there is a "
                    f"network: {wanted.command}"
                ) from error
    if wanted.sha256 is not None:
        digest = file_sha256(path)
        if digest != wanted.sha256:
            raise ValueError(f"{reference}: the file at {path} has sha256 {digest}")
    return path


def require_model(reference: str, kind: str, key: str) -> None:
    """Checks without the network that a reference is a repository, or a folder that `transformers` takes for a `kind`.

    Args:
        reference: a folder, or `hub:ORG/NAME[@REVISION]`.
        kind: the `model_type` that its config must name.
        key: the option, for errors.

    Raises:
        ValueError: if it is neither.
    """
    if reference.startswith(PREFIX):
        if parse(reference).file is not None:
            raise ValueError(f"{key} {reference}: expected a whole repository, hub:ORG/NAME[@REVISION]")
        return
    config = Path(reference, "config.json")
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{key} {reference}: expected a folder of a {kind} model, {config} cannot be read") from error
    if found != kind:
        raise ValueError(f"{key} {reference}: {config} says model_type={found!r}, expected {kind!r}")

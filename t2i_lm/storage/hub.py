"""Files of the Hugging Face hub by reference: `hf://ORG/NAME[@REVISION][/FILE][#sha256=HEX]`, huggingface_hub's form.

The cache comes first, so that a fetched file works offline. Without FILE, the reference is to the whole repository.
`hub:` is the former spelling of `hf://`.
"""

import json
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.writing import is_disk_error, problem

PREFIXES = ("hf://", "hub:")
# Names of a tokenizer beside a model's weights: of transformers, and of this suite's exports.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "text_tokenizer.json", "text_tokenizer.model")
# Files that a tokenizer's is read with, in order of precedence: they say where documents begin and end.
BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
_FORM = re.compile(
    r"(hf://|hub:)(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>[^#]+))?(#sha256=(?P<sha256>[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the hub; all of its files where `file` is None."""

    repo: str
    revision: str | None
    file: str | None
    sha256: str | None

    @property
    def beside(self) -> list[str]:
        """The files that a tokenizer's is read with; the repository may lack some."""
        folder, slash, name = (self.file or "").rpartition("/")
        return [f"{folder}{slash}{other}" for other in BESIDE_TOKENIZER] if name in TOKENIZERS else []

    @property
    def command(self) -> str:
        """The shell command that fetches it into the cache, of a tokenizer with the files beside it."""
        revision = f"--revision {self.revision}" if self.revision else ""
        return " ".join(part for part in ("hf download", self.repo, self.file, *self.beside, revision) if part)


def is_hub(path: str) -> bool:
    """Whether a path is a reference to the hub."""
    return path.startswith(PREFIXES)


def parse(reference: str) -> HubFile:
    """The parts of a reference.

    Raises:
        ValueError: if it has another form.
    """
    match = _FORM.fullmatch(reference)
    if match is None:
        raise ValueError(f"{reference}: expected hf://ORG/NAME[@REVISION][/FILE][#sha256=64 hexadecimal digits]")
    if match["sha256"] and not match["file"]:
        raise ValueError(f"{reference}: a sha256 requires a file")
    if reference.startswith("hub:"):
        _note(f"note: {reference} is now written hf://{reference.removeprefix('hub:')}")
    return HubFile(match["repo"], match["revision"], match["file"], match["sha256"])


@cache
def _note(text: str) -> None:
    """Prints a line once, however often a reference is read."""
    print(text, file=sys.stderr)


def cached(reference: str) -> Path | None:
    """The path in the cache; None if it is absent. Never uses the network."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    remote = parse(reference)
    try:
        if remote.file is None:
            return Path(snapshot_download(remote.repo, revision=remote.revision, local_files_only=True))
        return Path(hf_hub_download(remote.repo, remote.file, revision=remote.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def fetch(reference: str) -> Path:
    """The local file, or folder of a whole repository, fetched if it is not in the cache.

    Raises:
        ValueError: if it is out of reach, naming the command that fetches it, or its sha256 differs.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    remote = parse(reference)
    # A folder in the cache may lack files, if only one was fetched: the hub is asked first for a whole repository.
    path = None if remote.file is None else cached(reference)
    if path is None:
        try:
            if remote.file is None:
                path = Path(snapshot_download(remote.repo, revision=remote.revision))
            else:
                path = Path(hf_hub_download(remote.repo, remote.file, revision=remote.revision))
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            path = cached(reference)
            if path is None:
                why = problem(error) if is_disk_error(error) else type(error).__name__
                raise ValueError(
                    f"{reference} is not in the cache and cannot be fetched ({why}). Where there is a "
                    f"network: {remote.command}"
                ) from error
    if remote.sha256 is not None:
        digest = file_sha256(path)
        if digest != remote.sha256:
            raise ValueError(f"{reference}: the file at {path} has sha256 {digest}")
    return path


def beside(reference: str, path: Path) -> list[str]:
    """References to the files that a tokenizer's is read with, of the commit that its file in the cache is of."""
    remote = parse(reference)
    commit = path.parents[(remote.file or "").count("/")].name
    return [f"hf://{remote.repo}@{commit}/{name}" for name in remote.beside]


def fetch_if_there(reference: str) -> None:
    """Fetches a file of a commit, unless it has none, which the cache may know without the network.

    Raises:
        ValueError: as `fetch`, if it is unknown whether there is one.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError

    remote = parse(reference)
    if not _is_absent(remote.repo, str(remote.revision), str(remote.file)):
        try:
            fetch(reference)
        except ValueError as error:
            if not isinstance(error.__cause__, RemoteEntryNotFoundError):
                raise


def _is_absent(repo: str, commit: str, file: str) -> bool:
    """Whether the cache knows that a commit has no such file: by a former request, or the list of its files."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    if try_to_load_from_cache(repo, file, revision=commit) is _CACHED_NO_EXIST:
        return True
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # of older versions, which keep no list
        return False
    with suppress(CachedRepoTreeNotFoundError):
        return file not in {entry.path for entry in get_cached_repo_tree(repo, revision=commit)}
    return False


def require_model(reference: str, kind: str, key: str) -> None:
    """Checks without the network that a reference is a repository, or a `transformers` folder of a model type.

    Args:
        reference: a folder, or `hf://ORG/NAME[@REVISION]`.
        kind: the required `model_type`.
        key: the option, for errors.

    Raises:
        ValueError: if it is neither.
    """
    if is_hub(reference):
        if parse(reference).file is not None:
            raise ValueError(f"{key} {reference}: expected a whole repository, hf://ORG/NAME[@REVISION]")
        return
    config = Path(reference, "config.json")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{key} {reference}: expected a folder of a {kind} model, {config} cannot be read") from error
    if model_type != kind:
        raise ValueError(f"{key} {reference}: {config} has model_type={model_type!r}, expected {kind!r}")

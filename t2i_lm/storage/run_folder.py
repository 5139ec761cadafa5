"""Run folders: config, environment, metrics, report, checkpoints and samples of a run."""

import errno
import glob
import gzip
import json
import os
import platform
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from t2i_lm.storage.line_digests import check
from t2i_lm.storage.reading import reading
from t2i_lm.storage.sealed import DIGEST, digest_of, require_digest
from t2i_lm.storage.writing import DiskError
from t2i_lm.storage.yaml_text import read_yaml

PACKAGES = ("torch", "lightning", "torchmetrics", "datasets", "sentencepiece", "diffusers", "numpy", "t2i_lm")
CONFIG, ENVIRONMENT, METRICS, REPORT, EVENTS, GROUPS = (
    "config.yaml",
    "env.json",
    "metrics.jsonl",
    "report.json",
    "events.log",
    "groups.txt",  # parameters by group, trainable and frozen
)
# In place of metrics.jsonl in collected results (`comparison/collect.py`). Its first line says that it is thinned.
THINNED, THINNED_ENTRY = "metrics.jsonl.gz", "thinned"
LARGEST_THINNED = 2**26  # bytes that are unpacked
METRICS_DIGEST, ENVIRONMENT_DIGEST = "metrics_digest", "environment_digest"  # in report.json
CONFIG_DIGEST = "config_digest"  # in env.json
CONTENTS = "contents"  # in env.json: what identifies the data that a run read, by key
OWNER = "owner.json"  # while a process writes the folder
# Validation in metrics.jsonl and report.json: `val`, or `val/SPLIT` for each of several splits. The primary one is
# `PRIMARY`, or else the first by name.
VAL, PRIMARY = "val", "iid"
CHECKPOINTS, SAMPLES, FID, PROBES = "checkpoints", "samples", "fid", "probes"
TOKENS = f"{SAMPLES}/tokens.npz"  # images with their ids and reconstructions, for Figure 1


class Entries(dict[str, Any]):
    """Keys and values of a file, nested ones too; a key that is looked up and absent is a ValueError with its name."""

    def __init__(self, values: Mapping[str, Any], file: Path, prefix: str = "") -> None:
        self.file, self.prefix = file, prefix
        super().__init__(
            (key, Entries(value, file, f"{prefix}{key}.") if isinstance(value, dict) else value)
            for key, value in values.items()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return deepcopy(dict(self), memo)

    def __missing__(self, key: str) -> NoReturn:
        raise ValueError(f"{self.file} {f'has no {self.prefix}{key}' if self.file.is_file() else 'is missing'}")


@dataclass(frozen=True)
class Run:
    """The content of a run folder, or of collected results, whose training lines are thinned.

    A value that config.yaml, env.json or report.json lacks is a ValueError that names it and the file (`Entries`).
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    report: dict[str, Any] | None  # None while the run is unfinished

    @property
    def name(self) -> str:
        """The experiment's name."""
        return str(self.config["name"])

    def records(self, key: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl with `key` (train, forgetting, ...); validations are read by `validations`."""
        return [record for record in self.metrics if key in record]

    def before(self, key: str) -> dict[str, Any] | None:
        """The line of `records` before the first step; None where that was not measured, as with a later interval."""
        return next((record for record in self.records(key) if record["step"] == 0), None)

    @property
    def validation_splits(self) -> tuple[str, ...]:
        """Names of the validation splits, the primary one first; empty where there is one validation set."""
        keys = {key for record in self.metrics for key in record if key.startswith(f"{VAL}/")}
        names = sorted(key.removeprefix(f"{VAL}/") for key in keys)
        return tuple(sorted(names, key=lambda name: name != PRIMARY))

    @property
    def nonfinite(self) -> int:
        """Validation losses that were not finite: the `nll` of their line is of the others alone."""
        lines = [value for record in self.metrics for key, value in record.items() if key.partition("/")[0] == VAL]
        losses = [[entry for entry in line.values() if isinstance(entry, Mapping)] for line in lines]
        return sum(max((entry.get("nonfinite", 0) for entry in line), default=0) for line in losses)

    @property
    def nonfinite_words(self) -> str:
        """`nonfinite` in a message."""
        return f"{self.nonfinite:,} validation losses that are not finite"

    def validations(self, split: str | None = None) -> list[dict[str, Any]]:
        """Validation lines of metrics.jsonl with the values of a split under the key `val`.

        Args:
            split: one of `validation_splits`; None for the primary one, or for the only validation set.
        """
        key = VAL if split is None and not self.validation_splits else f"{VAL}/{split or self.validation_splits[0]}"
        return [{**record, VAL: record[key]} for record in self.records(key)]


def new_run_folder(root: Path, name: str, scale: str) -> Path:
    """Creates `root/name/DATE-TIME-SCALE`, with a number appended if that exists.

    Raises:
        ValueError: if it cannot be created.
    """
    try:
        return new_dated_folder(root / name, f"-{scale}")
    except OSError as error:
        raise ValueError(f"run.dir={root}: cannot create {error}") from error


def new_dated_folder(parent: Path, end: str = "") -> Path:
    """Creates `parent/DATE-TIME` followed by `end`, with a number appended if that exists.

    Raises:
        OSError: naming the folder that cannot be created.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(100):
        folder = parent / (f"{stamp}{end}" + (f"-{number}" if number else ""))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise DiskError.of(error, folder) from error
        return folder
    raise DiskError(errno.EEXIST, "a hundred folders of one second exist", str(parent / f"{stamp}{end}"))


def require_no_links(folder: Path) -> None:
    """Checks that no link leads what is written into a run folder out of it; `checkpoints/` may lie on another disk.

    Raises:
        ValueError: naming the first link and where it leads.
    """
    top = [entry for entry in sorted(folder.iterdir()) if entry.name != CHECKPOINTS]
    below = [entry for part in top if part.is_dir() and not part.is_symlink() for entry in sorted(part.iterdir())]
    for entry in (*top, *below):
        if entry.is_symlink() and not entry.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{entry} is a link to {entry.readlink()}, and a run writes nothing outside of its folder: delete the "
                "link, or put the file there"
            )


def run_folders(root: Path, name: str | None = None, scale: str = "") -> list[Path]:
    """Run folders below `root` as of `in_order`, optionally of one experiment and one scale, oldest first."""
    of_name = "*" if name is None else glob.escape(name)
    runs = in_order(path.parent for path in root.glob(f"{of_name}/*/{CONFIG}"))
    return [folder for folder in runs if _has_form(folder.name, scale)] if scale else runs


def folders_below(root: Path, name: str | None = None, file: str = CONFIG) -> list[Path]:
    """Run folders at any depth below `root`, also behind symbolic links, optionally of one experiment.

    Each is listed once, by its own path if that lies below `root`, else by one through a link. A link to a folder above
    `root` is not followed. Without a name, `root` itself is listed too if it is a run folder.

    Args:
        root: where to search.
        name: the experiment.
        file: what a folder must hold.
    """
    found, seen, tops = list[Path](), set[Path](), [root]
    above = {*Path(os.path.realpath(root)).parents}
    for top in tops:  # grows by the links, which so come after all other folders
        for path, folders, files in os.walk(top):
            folder, place = Path(path), Path(os.path.realpath(path))
            if place in seen or place in above:
                folders.clear()
                continue
            seen.add(place)
            if file in (*folders, *files):
                found.append(folder)
            folders.sort()
            tops += [folder / one for one in folders if one != CHECKPOINTS and (folder / one).is_symlink()]
    if name is None:
        return found
    parts = Path(name).parts
    return [folder for folder in found if folder.relative_to(root).parts[-len(parts) - 1 : -1] == parts]


def in_order(folders: Iterable[Path]) -> list[Path]:
    """Run folders with a name of `new_run_folder`, oldest first; a line on stderr names each other one.

    A folder that was renamed or copied has no place in this order, and is used only where its own path is given.
    """
    found = {folder: _has_form(folder.name, _scale_of(folder)) for folder in folders}
    for folder, has_form in found.items():
        if not has_form:
            _tell_left_out(folder)
    return sorted((folder for folder, has_form in found.items() if has_form), key=lambda folder: folder.name)


def _has_form(name: str, scale: str | None) -> bool:
    """Whether a folder's name is one of `new_run_folder` for a scale; None: for any."""
    return bool(re.fullmatch(rf"\d{{8}}-\d{{6}}-{'.+' if scale is None else re.escape(scale)}(-\d+)?", name))


def _scale_of(folder: Path) -> str | None:
    """The scale that a config.yaml names in plain letters, as almost all do; None for others and damaged ones."""
    try:
        line = re.search(r"^scale: ([\w-]+)$", (folder / CONFIG).read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return line[1] if line else None


@cache
def _tell_left_out(folder: Path) -> None:
    print(f"note: {folder} is left out: its name is not DATE-TIME-SCALE; give its own path to use it", file=sys.stderr)


def find_run(path: Path) -> Path:
    """The run folder at a path, or the newest in a folder of runs.

    Raises:
        ValueError: if there is none.
    """
    if (path / CONFIG).is_file():
        return path
    runs = in_order(file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/{CONFIG}"))
    if not runs:
        raise ValueError(f"{path} is not a run folder and contains none (a run folder has a {CONFIG})")
    return runs[-1]


def is_collected(folder: Path) -> bool:
    """Whether a folder holds collected results: what figures and tables read, without checkpoints."""
    return (folder / THINNED).is_file()


def require_checkpoints(folder: Path) -> None:
    """Checks that a run folder is that of a training.

    Raises:
        ValueError: if it holds collected results.
    """
    if is_collected(folder):
        raise ValueError(
            f"{folder} holds collected results, thinned and without checkpoints: they can be drawn, compared and "
            "reported; all else requires the run itself"
        )


def thinned_from(folder: Path) -> dict[str, Any]:
    """What collected results say of the run that they are from: numbers of lines, digests of its files.

    Raises:
        ValueError: if they are damaged.
    """
    return _thinned_lines(folder / THINNED)[0]


def read_run(folder: Path) -> Run:
    """Reads a run folder, without an incomplete last line of metrics.jsonl.

    Raises:
        ValueError: if it is not a run folder, or a file in it is damaged: other than the digests say.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a run folder: it has no {CONFIG}")
    metrics, tip = _metrics(folder)
    if any("step" not in record for record in metrics):
        raise ValueError(f"{_metrics_file(folder)} is damaged: a line has no step")
    environment = read_environment(folder)
    config = read_config(folder, environment)
    report = _json(folder / REPORT)
    if report is not None and report.get(METRICS_DIGEST, tip) != tip:
        raise ValueError(
            f"{_metrics_file(folder)} is not the file of which {REPORT} was written: its last lines are missing"
        )
    known = environment.get(DIGEST)
    if report is not None and report.get(ENVIRONMENT_DIGEST, known) != known:
        raise ValueError(f"{folder / ENVIRONMENT} is not the file of which {REPORT} was written; restore it")
    return Run(
        folder,
        Entries(config, folder / CONFIG),
        Entries(environment, folder / ENVIRONMENT),
        metrics,
        None if report is None else Entries(report, folder / REPORT),
    )


def fits_digest(config: Mapping[str, Any], environment: Mapping[str, Any]) -> bool:
    """Whether the values of a config.yaml are those that env.json was written for, if it says."""
    entry = environment.get(CONFIG_DIGEST)
    return entry is None or config_digest(config, entry["without"])[DIGEST] == entry[DIGEST]


def read_config(folder: Path, environment: Mapping[str, Any]) -> dict[str, Any]:
    """config.yaml of a run folder, as it is written there.

    Raises:
        ValueError: if it cannot be read, or env.json was written for other values.
    """
    path = folder / CONFIG
    with reading("run folder", path):
        config = _mapping(read_yaml(path.read_text(encoding="utf-8")))
    if not fits_digest(config, environment):
        raise ValueError(
            f"{path} has other values than the run was trained with, by the digest in {ENVIRONMENT}; restore it (only "
            "paths, and keys that change no result, may differ)"
        )
    return config


def config_digest(config: Mapping[str, Any], without: Iterable[str]) -> dict[str, Any]:
    """The entry of env.json for a nested config: a digest of its values but for those of the keys `without`."""
    left_out = sorted(without)
    values = {key: value for key, value in _leaves(config) if key not in left_out}
    return {DIGEST: digest_of(values), "without": left_out}


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _metrics_file(folder: Path) -> Path:
    return folder / (THINNED if is_collected(folder) else METRICS)


def _metrics(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The records of a folder without their digests, and the digest of the last."""
    path = _metrics_file(folder)
    if path.name == THINNED:
        _, records, tip = _thinned_lines(path)
        return records, tip
    return _records(path, path.read_bytes() if path.is_file() else b"")


def _thinned_lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """What the first line of thinned metrics says, and the other records and last digest as in `_metrics`."""
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST_THINNED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}; restore it, or collect the run again") from error
    if len(content) > LARGEST_THINNED:
        raise ValueError(f"{path} is damaged: it holds more than {LARGEST_THINNED:,} bytes")
    records, tip = _records(path, content)
    head = records[0].get(THINNED_ENTRY) if records else None
    if not isinstance(head, dict):
        raise ValueError(f"{path} is damaged: its first line is not the one of thinned metrics")
    return head, records[1:], tip


def _records(path: Path, content: bytes) -> tuple[list[dict[str, Any]], str]:
    *lines, rest = content.split(b"\n")
    records, tip, has_digests = [], "", False
    for number, line in enumerate(lines, start=1):
        try:
            body, tip, has_digests = check(tip, has_digests, line)
            records.append(_mapping(json.loads(body)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} line {number} is damaged: {error}") from error
    with suppress(ValueError, TypeError):  # else it is incomplete, as after a kill
        if rest:
            body, last, _ = check(tip, has_digests, rest)
            records.append(_mapping(json.loads(body)))
            tip = last
    return records, tip


def metrics_digest(folder: Path) -> str:
    """Digest of a run's metrics.jsonl up to its last line."""
    return _metrics(folder)[1]


def logged_position(folder: Path, step: int) -> int:
    """Place of a run's loggers on their axis, tokens or else samples, at its last line up to an optimizer step."""
    records = [record for record in _metrics(folder)[0] if record.get("step", 0) <= step]
    return max((int(record.get("tokens_nominal", record.get("samples", 0))) for record in records), default=0)


def read_environment(folder: Path) -> dict[str, Any]:
    """env.json of a run folder; empty where there is none."""
    return _json(folder / ENVIRONMENT) or {}


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    with reading("run folder", path):
        content = _mapping(json.loads(path.read_text(encoding="utf-8")))
    require_digest(content, path, "restore it from a copy")
    return content


def _mapping(content: Any) -> dict[str, Any]:
    """The content of a file of keys and values; other content is an error of `reading`."""
    if not isinstance(content, dict):
        raise TypeError("it holds no keys and values")
    return content


def environment(**extra: Any) -> dict[str, Any]:
    """The code, versions and hardware of a result."""
    # A package in a .venv lies inside of the repository of whoever installed it, which says nothing about this code.
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    return {
        "git": _git("rev-parse", "HEAD") if tracked else None,
        "git_dirty": tracked and bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "versions": {name: _version(name) for name in PACKAGES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "directory": str(Path.cwd()),  # where relative paths of config.yaml start
        **extra,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

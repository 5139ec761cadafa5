"""Compact results of finished runs for the repository: what figures, tables and the report read, some 30 kB a run.

A run's folder becomes one of the same place below another folder, with config.yaml, env.json and report.json without
absolute paths, thinned metrics, the results of evaluations and the digest of the last checkpoint, and on request the
images of the report. `storage.run_folder.read_run` reads it as a run folder.
"""

import gzip
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from t2i_lm.comparison.arms import unfinished
from t2i_lm.comparison.comparability import ARM_KEYS, ENVIRONMENT, ORDER, SEED, config_values, differences
from t2i_lm.comparison.portable import portable, portable_config
from t2i_lm.comparison.thinning import TRAIN, thinned_records
from t2i_lm.config.key_groups import is_neutral
from t2i_lm.config.load import changed_yaml, flatten_mapping
from t2i_lm.evaluation.base import FINISHED, read_result
from t2i_lm.storage.line_digests import signed
from t2i_lm.storage.owner import require_free
from t2i_lm.storage.reading import reason
from t2i_lm.storage.run_folder import (
    CHECKPOINTS,
    CONFIG,
    CONFIG_DIGEST,
    ENVIRONMENT_DIGEST,
    METRICS_DIGEST,
    OWNER,
    REPORT,
    THINNED,
    THINNED_ENTRY,
    Run,
    config_digest,
    folders_below,
    in_order,
    is_collected,
    metrics_digest,
    read_run,
    thinned_from,
)
from t2i_lm.storage.run_folder import ENVIRONMENT as ENVIRONMENT_FILE
from t2i_lm.storage.sealed import DIGEST, digest_of, sealed
from t2i_lm.storage.writing import write_atomic
from t2i_lm.storage.yaml_text import read_yaml

# Makes the files of a run by name, given the folders that paths in them start from.
Images = Callable[[Run, Sequence[Path]], Mapping[str, bytes]]


@dataclass
class Collection:
    """What a call of `collect` did.

    Attributes:
        added: run folders, and the bytes and kept training lines of each.
        known: those that were there already, by the bytes of results and images that were added to them.
        refused: a line for each that was not collected.
    """

    added: dict[Path, tuple[int, int, int]] = field(default_factory=dict)
    known: dict[Path, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def collect(root: Path, folders: Sequence[Path], out: Path, images: Images | None = None) -> Collection:
    """Collects the finished runs below some folders.

    Args:
        root: folder of runs; a run keeps its place below it.
        folders: those whose runs are collected, in `root`.
        out: folder of the results.
        images: makes the image files of a run; None for none.

    Raises:
        ValueError: if there is no run, or a folder is not in `root`.
        OSError: if a file cannot be written.
    """
    done, settings = Collection(), _Settings()
    for folder in _run_folders(out) if out.is_dir() else ():
        if (folder / REPORT).is_file():  # else an interrupted call wrote it, and this one writes it again
            settings.add(read_run(folder), ())
    for folder in _chosen(root, folders, out):
        target = out / folder.relative_to(root)
        try:
            _collect_one(root, folder, target, images, settings, done)
        except (ValueError, yaml.YAMLError) as error:
            done.refused.append(f"{folder}: {reason(error)}")
    return done


def _collect_one(
    root: Path,
    folder: Path,
    target: Path,
    images: Images | None,
    settings: "_Settings",
    done: Collection,
) -> None:
    run = read_run(folder)
    if is_collected(folder):
        raise ValueError("holds collected results already; --runs is the folder of the runs themselves")
    require_free(folder / OWNER)
    if run.report is None:
        raise ValueError(unfinished(run).removeprefix("left out, ").removesuffix(f": {folder}"))
    source = {
        METRICS_DIGEST: metrics_digest(folder),
        ENVIRONMENT_DIGEST: digest_of(run.environment),
        "report_digest": digest_of(run.report),
    }
    there, starts = (target / REPORT).is_file(), _starts(run, root)  # the report is written last
    if there:
        _require_same(run, target, source)
    else:
        settings.require_comparable(run, starts)
    more = _results(folder, starts)
    if images is not None:
        more |= images(run, starts)
    for name, content in [*more.items()]:
        if (target / name).is_file():
            if name.endswith(".json") and _measured(read_result(target / name)) != _measured(json.loads(content)):
                raise ValueError(f"{target / name} is another result; delete it to collect this one")
            del more[name]
    files, kept = dict[str, bytes](), 0
    if not there:
        files, kept = _own_files(run, starts, source)
    for name, content in (*more.items(), *files.items()):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target / name, content)
    size = sum(map(len, (*more.values(), *files.values())))
    if there:
        done.known[target] = size
    else:
        done.added[target] = size, kept, len(run.records(TRAIN))
        settings.add(run, starts)


def _chosen(root: Path, folders: Sequence[Path], out: Path) -> list[Path]:
    """Run folders below some folders of `root`, oldest first, without those of `out`."""
    found: dict[Path, None] = {}
    for folder in folders or [root]:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        starts = (Path(os.path.abspath(folder)), Path(os.path.abspath(root))), (folder.resolve(), root.resolve())
        place = next((root / one.relative_to(top) for one, top in starts if one.is_relative_to(top)), None)
        if place is None:
            raise ValueError(f"{folder} is not in --runs {root}, below which a run keeps its place")
        found |= dict.fromkeys(_run_folders(place) if place == root else (*_own(place), *_run_folders(place)))
    if out.resolve() == root.resolve():
        raise ValueError(f"--out {out}: expected another folder than --runs {root}")
    outside = [folder for folder in found if not folder.resolve().is_relative_to(out.resolve())]
    if not outside:
        raise ValueError(f"no run in {', '.join(map(str, folders or [root]))} (a run folder has a {CONFIG})")
    return sorted(outside, key=lambda folder: (folder.name, folder))


def _own(folder: Path) -> list[Path]:
    return [folder] if (folder / CONFIG).is_file() else []


def _run_folders(root: Path) -> list[Path]:
    return in_order(folder for folder in folders_below(root) if folder != root)


def _require_same(run: Run, target: Path, source: Mapping[str, str]) -> None:
    """Checks that collected results are of a run as it is now.

    Raises:
        ValueError: naming the files that have changed.
    """
    if not is_collected(target):
        raise ValueError(f"{target} is a run folder, and no collected results")
    names = {METRICS_DIGEST: "metrics.jsonl", ENVIRONMENT_DIGEST: ENVIRONMENT_FILE, "report_digest": REPORT}
    before = thinned_from(target)
    if changed := [names[key] for key, value in source.items() if before.get(key) != value]:
        raise ValueError(
            f"{target} was collected with other content of {', '.join(changed)}; delete it to collect the run again"
        )


def _starts(run: Run, root: Path) -> list[Path]:
    """Folders to which paths in a run's files are made relative."""
    directory = run.environment.get("directory")
    named = [] if directory is None else [Path(directory)]
    return [*named, Path.cwd(), root.absolute(), root.resolve()]


def _own_files(run: Run, starts: Sequence[Path], source: Mapping[str, str]) -> tuple[dict[str, bytes], int]:
    """The files of a run by name, the report last; the number of training lines that were kept."""
    assert run.report is not None
    values = flatten_mapping(run.config)
    moved = {key: value for key, value in portable_config(values, starts).items() if value != values[key]}
    config = changed_yaml(run.folder / CONFIG, moved) if moved else (run.folder / CONFIG).read_text(encoding="utf-8")
    environment = portable({key: value for key, value in run.environment.items() if key != "directory"}, starts)
    if CONFIG_DIGEST in environment:
        without = environment[CONFIG_DIGEST]["without"]
        environment[CONFIG_DIGEST] = config_digest(dict(read_yaml(config)), without)
    environment = sealed(environment)
    records = thinned_records(run)
    kept = sum(TRAIN in record for record in records)
    head = {THINNED_ENTRY: {"train": kept, "of": len(run.records(TRAIN)), **source}}
    lines, tip = [], ""
    for record in (head, *records):
        line, tip = signed(tip, json.dumps(record).encode())
        lines.append(line + b"\n")
    links = {METRICS_DIGEST: tip, ENVIRONMENT_DIGEST: environment[DIGEST]}
    files = {
        CONFIG: config.encode(),
        ENVIRONMENT_FILE: _json(environment),
        THINNED: gzip.compress(b"".join(lines), 9, mtime=0),
        REPORT: _json(sealed({**portable(run.report, starts), **links})),
    }
    return files, kept


def _results(folder: Path, starts: Sequence[Path]) -> dict[str, bytes]:
    """Results of evaluations, and the digest of the last checkpoint, by which those of others are told from its own."""
    files = {}
    for file in sorted(folder.glob("evaluations/*/*.json")):
        result = read_result(file)
        written = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(file.stat().st_mtime))
        result = portable({FINISHED: written, **result}, starts)
        files[file.relative_to(folder).as_posix()] = _json(sealed(result))
    for file in sorted((folder / CHECKPOINTS).glob("*.ckpt.sha256"))[-1:]:
        files[file.relative_to(folder).as_posix()] = file.read_bytes()
    return files


def _measured(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in (FINISHED, DIGEST)}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


class _Settings:
    """The settings of collected runs, each with a run of every arm and seed."""

    def __init__(self) -> None:
        self._runs: dict[str, list[Run]] = {}

    def add(self, run: Run, starts: Sequence[Path]) -> None:
        own = self._runs.setdefault(_setting(run, starts), [])
        if not any(_place(run) == _place(other) for other in own):
            own.append(run)

    def require_comparable(self, run: Run, starts: Sequence[Path]) -> None:
        """Checks that a run, whose paths begin at `starts`, can be compared with those of its setting.

        Raises:
            ValueError: naming what differs, such as the data version.
        """
        for other in self._runs.get(_setting(run, starts), ()):
            # The arms start from other weights by design, and every seed has another order.
            varied = (SEED, ORDER, *(() if _arm(run) == _arm(other) else (ENVIRONMENT["backbone"],)))
            if differing := differences([other, run], varied, paired=True):
                words = "; ".join(f"{key} {mine}, there {theirs}" for key, (theirs, mine) in differing.items())
                raise ValueError(f"cannot be compared with the run of its setting in {other.folder}: {words}")


def _setting(run: Run, starts: Sequence[Path]) -> str:
    """The values of a run that runs of one setting share, whatever their arm and seed."""
    values = portable_config(config_values(run), starts)
    shared = {key: value for key, value in values.items() if not is_neutral(key) and key not in (*ARM_KEYS, SEED)}
    return json.dumps(shared, sort_keys=True, default=str)


def _place(run: Run) -> tuple[Any, ...]:
    return (*_arm(run), config_values(run)[SEED])


def _arm(run: Run) -> tuple[Any, ...]:
    values = config_values(run)
    return tuple(values[key] for key in ARM_KEYS)

"""Probes for the page: the records of `python -m t2i_lm.probe` in the folders of finished runs."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_lm.comparison.comparability import config_values
from t2i_lm.reporting.figures import FigureBlock, without_title
from t2i_lm.reporting.images import whole_image
from t2i_lm.storage.reading import reason
from t2i_lm.storage.run_folder import CHECKPOINTS, PROBES, Run
from t2i_lm.storage.sealed import read_sealed

ORDER = ("tokens", "rows", "similarity", "attention", "gradients")
SIZES = ("sequences", "batches")  # options of the command that are among a record's settings


@dataclass(frozen=True)
class ProbeRecord:
    """A probe of finished runs.

    Attributes:
        file: the record, its figure beside it.
        content: as `analysis.base.ProbeResult.write` writes it.
        runs: by label, the first one the reference.
    """

    file: Path
    content: Mapping[str, Any]
    runs: Mapping[str, Run]

    @property
    def place(self) -> int:
        """Of its section's figures."""
        name = self.file.stem
        return ORDER.index(name) if name in ORDER else len(ORDER)


@dataclass(frozen=True)
class Probes:
    """Figures of probes of the same runs, a sentence each, and the command that makes them again."""

    figures: list[FigureBlock]
    sentences: list[str]
    command: str
    runs: Mapping[str, Run]


def find_probes(pool: Sequence[Run], pair: Sequence[Run]) -> tuple[Probes | None, list[str]]:
    """The probes of one set of runs, and notes on the other records.

    Args:
        pool: the finished runs.
        pair: runs whose probes come first; else those with most probes, then the newest, are shown.
    """
    notes: list[str] = []
    sets: dict[tuple[Path, ...], list[ProbeRecord]] = {}
    for run in pool:
        for file in sorted((run.folder / PROBES).glob("*/*.json")):
            try:
                record = _read(file, pool)
            except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
                notes.append(f"left out, unreadable: {file}: {reason(error)}")
                continue
            if isinstance(record, str):
                notes.append(f"left out: {file}: {record}")
            else:
                sets.setdefault(tuple(sorted(one.folder for one in record.runs.values())), []).append(record)
    if not sets:
        return None, notes
    first = tuple(sorted(run.folder for run in pair))
    chosen = max(sets, key=lambda runs: (runs == first, len(sets[runs]), max(map(_started, sets[runs]))))
    records = sorted(sets[chosen], key=lambda record: record.place)
    others = [str(record.file) for runs, own in sets.items() if runs != chosen for record in own]
    notes += [f"probes of other runs, not shown: {', '.join(others)}"] if others else []
    figures = []
    for record in records:
        try:
            figures.append(_block(record))
        except OSError as error:
            notes.append(f"left out, unreadable: {_figure(record.file)}: {reason(error)}")
    sentences = [str(record.content["sentence"]) for record in records]
    return Probes(figures, sentences, _command(records[0]), records[0].runs), notes


def _read(file: Path, pool: Sequence[Run]) -> ProbeRecord | str:
    """A record with its runs, or the reason why it is not theirs any more."""
    content = read_sealed(file, "restore it from a copy, or probe again")
    runs = {}
    for label, known in content["runs"].items():
        candidates = [run for run in pool if run.folder.parts[-2:] == Path(known["run"]).parts[-2:]]
        if not candidates:
            return f"{known['run']} is not among the finished runs"
        problems = [_difference(known, run) for run in candidates]
        if None not in problems:
            return str(problems[-1])
        runs[str(label)] = candidates[problems.index(None)]
    types = {"title": str, "sentence": str, "caption": str, "made_with": dict, "settings": dict, "varied": list}
    wrong = [key for key, expected in types.items() if not isinstance(content[key], expected)]
    if wrong or not runs or not {*SIZES} <= content["settings"].keys():
        raise ValueError("it is no record of a probe")
    return ProbeRecord(file, content, runs)


def _difference(known: Mapping[str, Any], run: Run) -> str | None:
    """What is no longer of the probed run; None where the run is as it was."""
    config = config_values(run)
    last, data = run.metrics[-1]["step"], run.environment.get("data_hash")
    if known["step"] != last:
        return f"of another checkpoint: step {known['step']} of {run.folder}, which has {last} steps"
    if known["data_hash"] != data:
        return f"of another data version: data hash {known['data_hash']}, that of {run.folder} is {data}"
    for key in ("name", "init", "seed"):
        if known[key] != config[key]:
            return f"of another run: {key} {known[key]}, that of {run.folder} is {config[key]}"
    digest = run.folder / CHECKPOINTS / f"{known['checkpoint']}.sha256"
    if digest.is_file() and known["checkpoint_sha256"] not in digest.read_text(encoding="ascii", errors="replace"):
        return f"of another checkpoint: {run.folder / CHECKPOINTS / known['checkpoint']} has changed since"
    return None


def _started(record: ProbeRecord) -> str:
    return str(record.content["made_with"].get("started", ""))


def _block(record: ProbeRecord) -> FigureBlock:
    content = record.content
    return FigureBlock(
        name=f"probe {record.file.stem}",
        title=content["title"],
        caption=f"{without_title(content['caption'], content['title'])} All numbers: {record.file}.",
        image=whole_image(_figure(record.file)),
        arms=record.runs,
    )


def _figure(file: Path) -> Path:
    """The figure beside a record: a PNG, or the smaller WebP of collected results."""
    smaller = file.with_suffix(".webp")
    return smaller if smaller.is_file() else file.with_suffix(".png")


def _command(record: ProbeRecord) -> str:
    """What probes the runs again, with sizes as they were."""
    options = [f"--{name}={record.content['settings'][name]}" for name in SIZES]
    options += [f"--varied={key}" for key in record.content["varied"]]
    return probe_command((run.folder for run in record.runs.values()), options)


def probe_command(folders: Iterable[Path], options: Sequence[str] = ()) -> str:
    """What probes some runs; those of the shipped arms without any."""
    runs = [*map(str, folders)] or ["runs/t2i_pretrained", "runs/t2i_scratch"]
    return shlex.join(["python", "-m", "t2i_lm.probe", *runs, *options])

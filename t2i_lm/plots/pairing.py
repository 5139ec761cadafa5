"""Search for the runs of a figure: the two arms of Figures 3 and 4, and groups of arms."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from t2i_lm.comparison.comparability import (
    PAIR_KEYS,
    MissingRunsError,
    config_differences,
    differences,
    pair_values,
    unequal,
)
from t2i_lm.plots.groups import Group
from t2i_lm.storage.reading import reason
from t2i_lm.storage.run_folder import VAL, Run, folders_below, read_run, run_folders

# Arm -> experiment, `init`, and the make target that trains it.
ARMS = {
    "pretrained": ("t2i_pretrained", "pretrained", "exp-pretrained"),
    "scratch": ("t2i_scratch", "random", "exp-scratch"),
}


@dataclass(frozen=True)
class Gap:
    """A final value of both arms. The gap is pre-trained minus random: < 0 favors pre-training."""

    quantity: str
    pretrained: float
    scratch: float

    @property
    def absolute(self) -> float:
        """In the quantity's own unit."""
        return self.pretrained - self.scratch

    @property
    def percent(self) -> float:
        """In percent of the random arm."""
        return 100 * self.absolute / self.scratch


@dataclass(frozen=True)
class RunPair:
    """A run from pre-trained and one from random weights, otherwise equal."""

    pretrained: Run
    scratch: Run

    @property
    def arms(self) -> dict[str, Run]:
        """Both runs by arm."""
        return {"pretrained": self.pretrained, "scratch": self.scratch}

    def unfinished(self) -> list[str]:
        """Arms without a report."""
        return [arm for arm, run in self.arms.items() if run.report is None]

    def uncontrolled(self) -> dict[str, tuple[Any, ...]]:
        """Differences beyond `name` and `init`; empty in a controlled pair."""
        return differences((self.pretrained, self.scratch))

    @property
    def validation_splits(self) -> tuple[str, ...]:
        """Names of the validation splits that both arms have, the primary one first; empty for one validation set."""
        return tuple(name for name in self.pretrained.validation_splits if name in self.scratch.validation_splits)

    def final_gaps(
        self, modalities: Sequence[str] = ("text", "image", "all"), split: str | None = None
    ) -> tuple[int | None, list[Gap]]:
        """Held-out nll (nats/token) and perplexity at the last validation of both arms.

        Args:
            modalities: those of the rows.
            split: a validation split; None for the primary one.

        Returns:
            That step and an nll and a ppl row per modality; (None, []) without a common validation.
        """
        pretrained, scratch = (
            {line["step"]: line[VAL] for line in run.validations(split)} for run in self.arms.values()
        )
        common = pretrained.keys() & scratch.keys()
        if not common:
            return None, []
        step = max(common)
        mine, other = pretrained[step], scratch[step]
        rows = []
        for modality in modalities:
            for key in ("nll", "ppl"):
                if key in mine.get(modality, {}) and key in other.get(modality, {}):
                    rows.append(Gap(f"{modality} {key}", mine[modality][key], other[modality][key]))
        return step, rows


def find_pair(root: Path, pretrained: Path | None = None, scratch: Path | None = None) -> RunPair:
    """The newest pair of runs that agree in PAIR_KEYS, and in all that can change a curve where there is one.

    Args:
        root: folder of runs.
        pretrained: run folder of the pre-trained arm; None to search.
        scratch: run folder of the random arm; None to search.

    Raises:
        ValueError: if no two runs pair; names the runs, what differs and what to run.
    """
    problems: list[str] = []
    named = {"pretrained": pretrained, "scratch": scratch}
    candidates = {
        arm: _discover(root, ARMS[arm][0], problems=problems) if folder is None else [_read_named(arm, folder)]
        for arm, folder in named.items()
    }
    pretrained_runs, scratch_runs = (_with_values(candidates[arm]) for arm in ("pretrained", "scratch"))
    pairs = [
        RunPair(mine, other)
        for mine, values in pretrained_runs
        for other, theirs in scratch_runs
        if not unequal(values, theirs)
    ]
    if not pairs:
        raise MissingRunsError(_no_pair(root, candidates, problems))
    pairs.sort(key=lambda pair: sorted((run.folder.name for run in pair.arms.values()), reverse=True), reverse=True)
    return next((pair for pair in pairs if not pair.uncontrolled()), pairs[0])


def find_group(root: Path, group: Group, lacks: Callable[[Run], str] = lambda _: "") -> dict[str, Run]:
    """The newest runs that agree with a run of the reference, by arm, without the arms that have no such run.

    Args:
        root: folder of runs.
        group: the arms.
        lacks: what the figure requires and a run has not, in words; empty for a run that can be drawn. Others are left
            out; those that are newer than all that can be drawn are named on stderr.

    Raises:
        ValueError: if fewer than the required arms are there.
    """
    (first, reference), *others = group.experiments.items()
    candidates = {arm: _with_values(_drawable(root, name, group, lacks)) for arm, name in others}
    complete: dict[str, Run] = {}
    # Oldest first: of equally many arms, the newest stay.
    for run, values in _with_values(_drawable(root, reference, group, lacks)):
        matching = {
            arm: [other for other, theirs in runs if not unequal(values, theirs)] for arm, runs in candidates.items()
        }
        arms = {first: run} | {arm: runs[-1] for arm, runs in matching.items() if runs}
        if len(arms) >= len(complete):
            complete = arms
    if len(complete) < group.required:
        names = ", ".join(name for _, name in others)
        partner = f" with a partner among {names}" if names else " with one to compare it with"
        lines = [f"no run of {reference} in {root}{partner if group.required > 1 else ''}"]
        raise MissingRunsError("; ".join([*lines, f"to make them: {group.command}", *_in_settings(root, reference)]))
    return complete


def _drawable(root: Path, name: str, group: Group, lacks: Callable[[Run], str]) -> list[Run]:
    """Runs of an experiment that a figure can draw, oldest first."""
    runs: list[Run] = []
    left_out: list[str] = []
    for run in _discover(root, name, group.records):
        if words := lacks(run):
            left_out.append(f"note: {run_label(run)} is left out: {words}")
        else:
            runs.append(run)
            left_out.clear()
    for line in left_out:
        print(line, file=sys.stderr)
    return runs


def _with_values(runs: Iterable[Run]) -> list[tuple[Run, dict[str, Any]]]:
    return [(run, pair_values(run)) for run in runs]


def _discover(root: Path, name: str, records: str = "train", problems: list[str] | None = None) -> list[Run]:
    """Runs of an experiment with something to plot, oldest first; adds a line to `problems` for each other one."""
    found: list[str] = []
    runs = [*newest_first(root, name, records, found)]
    if problems is not None:
        problems += reversed(found)
    return runs[::-1]


def newest_first(root: Path, name: str, records: str = "train", problems: list[str] | None = None) -> Iterator[Run]:
    """As `_discover`, newest first, each read when it is asked for."""
    for folder in reversed(run_folders(root, name)):
        try:
            run = _read(folder)
            if not (run.records("train") and run.records(records)):
                raise ValueError("no training step logged yet")
        except ValueError as error:
            if problems is not None:
                problems.append(f"{name}/{folder.name}  {error}")
            continue
        yield run


def _read(folder: Path) -> Run:
    """Reads a run; any damage is a ValueError of one line."""
    try:
        return read_run(folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"unreadable: {reason(error)}") from error


def _read_named(arm: str, folder: Path) -> Run:
    """The run of an arm that the command line names."""
    init = ARMS[arm][1]
    try:
        run = _read(folder)
    except ValueError as error:
        raise ValueError(f"--{arm} {folder}: {error}") from error
    if run.config.get("init") != init:
        raise ValueError(f"--{arm} {folder}: its config has init={run.config.get('init')!r}, expected {init!r}")
    if run.config.get("task") != "text_to_image":
        raise ValueError(f"--{arm} {folder}: its config has task={run.config.get('task')!r}, expected 'text_to_image'")
    if not run.records("train"):
        raise ValueError(f"--{arm} {folder}: no training step logged yet")
    return run


def _no_pair(root: Path, candidates: Mapping[str, list[Run]], problems: list[str]) -> str:
    keys = f"{', '.join(PAIR_KEYS[:-1])} and {PAIR_KEYS[-1]}"
    lines = [f"no run from pre-trained and run from random weights in {root} with equal {keys}"]
    listed = [_row(run) for runs in candidates.values() for run in runs] + problems
    lines += ["runs found:", *(f"  {row}" for row in listed)] if listed else ["runs found: none"]
    mine, other = candidates["pretrained"], candidates["scratch"]
    combinations = [*product(_with_values(reversed(mine)), _with_values(reversed(other)))]
    if combinations:
        (one, values), (two, theirs) = min(combinations, key=lambda both: len(unequal(both[0][1], both[1][1])))
        lines.append(f"nearest: {run_label(one)} and {run_label(two)} differ in")
        lines += [f"  {key}: {values[key]} and {theirs[key]}" for key in unequal(values, theirs)]
        lines += ["to make the partner of the first:", f"  {_partner_command('scratch', one, two)}"]
    elif mine or other:
        arm, have = ("scratch", mine[-1]) if mine else ("pretrained", other[-1])
        lines.append(f"to make the partner of {run_label(have)} (add any other key that you changed there):")
        lines.append(f"  {_partner_command(arm, have, None)}")
    else:
        lines += [
            "to make a pair:",
            *(f"  make {target} SCALE=demo" for _, _, target in ARMS.values()),
            *_in_settings(root, ARMS["pretrained"][0]),
        ]
    return "\n".join(lines)


def _in_settings(root: Path, name: str) -> list[str]:
    """A line on folders below `root` that hold runs of an experiment, as those of a study do."""
    folders = sorted({folder.parents[len(Path(name).parts)] for folder in folders_below(root, name)} - {root})
    return [f"such runs lie in {len(folders)} folders below it, for example --runs {folders[0]}"] if folders else []


def _partner_command(arm: str, have: Run, near: Run | None) -> str:
    """The command that trains a partner for `have`.

    Sets the keys in which `near`, a run of `arm`, differs; without one, every key that must agree.
    """
    values = pair_values(have)
    if near is not None and values["scale"] == pair_values(near)["scale"]:
        overrides = {key: value for key, (value, _) in config_differences(have, near).items() if key != "scale"}
    else:
        overrides = {key: values[key] for key in PAIR_KEYS if key not in ("data hash", "scale")}
    command = [
        "python",
        "-m",
        "t2i_lm.train",
        f"experiments/{ARMS[arm][0]}.yaml",
        "--scale",
        str(values["scale"]),
    ]
    command += [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
    return shlex.join(command)


def run_label(run: Run) -> str:
    """Experiment and folder of a run."""
    return f"{run.folder.parent.name}/{run.folder.name}"


def _row(run: Run) -> str:
    state = "" if run.report is not None else f"  (unfinished, step {run.metrics[-1]['step']})"
    return f"{run_label(run)}  " + "  ".join(f"{key}={value}" for key, value in pair_values(run).items()) + state

"""Choosing the two runs that are compared, and what to say where no two belong together."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from t2i_lm.plots.curves import PAIR_KEYS, Pair, config_differences, mismatches, pair_values
from t2i_lm.storage.run_folder import Run, read_run, run_folders

# Arm -> experiment name, `init`, and the make target that trains it.
ARMS = {
    "pretrained": ("t2i_pretrained", "pretrained", "exp-pretrained"),
    "scratch": ("t2i_scratch", "random", "exp-scratch"),
}


def find_pair(root: Path, pretrained: Path | None = None, scratch: Path | None = None) -> Pair:
    """The newest pair of runs that agree in PAIR_KEYS; a run that is named is not looked for.

    Args:
        root: folder of runs.
        pretrained: run folder of the pre-trained arm; None to choose.
        scratch: run folder of the random arm; None to choose.

    Raises:
        ValueError: if no two runs pair; it says what was found, what differs and what to run.
    """
    problems: list[str] = []
    chosen = {"pretrained": pretrained, "scratch": scratch}
    candidates = {
        arm: _discover(root, ARMS[arm][0], problems) if folder is None else [_named(arm, folder)]
        for arm, folder in chosen.items()
    }
    pairs = [
        Pair(mine, other)
        for mine in candidates["pretrained"]
        for other in candidates["scratch"]
        if not mismatches(mine, other)
    ]
    if not pairs:
        raise ValueError(_no_pair(root, candidates, problems))
    return max(
        pairs,
        key=lambda pair: sorted((run.folder.name for run in pair.arms.values()), reverse=True),
    )


@dataclass(frozen=True)
class Group:
    """Runs that one figure compares: arm -> experiment, and the command that makes them.

    The first arm is the reference: the others must agree with it in PAIR_KEYS. `required` arms must be there.
    Only runs with lines of `records` in metrics.jsonl are taken.
    """

    experiments: Mapping[str, str]
    command: str
    required: int = 2
    records: str = "train"


def find_group(root: Path, group: Group) -> dict[str, Run]:
    """The newest runs that agree with a run of the reference, by arm; arms without such a run are left out.

    Raises:
        ValueError: if fewer arms than required are there.
    """
    problems: list[str] = []
    (first, reference), *others = group.experiments.items()
    candidates = {arm: _discover(root, name, problems, group.records) for arm, name in others}
    found = []
    for run in _discover(root, reference, problems, group.records):
        fitting = {arm: [other for other in runs if not mismatches(run, other)] for arm, runs in candidates.items()}
        found.append({first: run} | {arm: runs[-1] for arm, runs in fitting.items() if runs})
    complete = max(found, key=lambda arms: (len(arms), arms[first].folder.name), default={})
    if len(complete) < group.required:
        partner = f" with a partner among {', '.join(name for _, name in others)}" if group.required > 1 else ""
        raise ValueError(f"no run of {reference} in {root}{partner}; to make them: {group.command}")
    return complete


def _discover(root: Path, name: str, problems: list[str], records: str = "train") -> list[Run]:
    """Runs of an experiment with a point to draw, oldest first; `problems` collects the others."""
    runs = []
    for folder in run_folders(root, name):
        try:
            run = _read(folder)
        except ValueError as error:
            problems.append(f"{name}/{folder.name}  {error}")
            continue
        if run.records("train") and run.records(records):
            runs.append(run)
        else:
            problems.append(f"{name}/{folder.name}  no training step logged yet")
    return runs


def _read(folder: Path) -> Run:
    """A run, or a ValueError of one line."""
    try:
        run = read_run(folder)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise ValueError(f"unreadable: {str(error).splitlines()[0]}") from error
    if not isinstance(run.config, dict):
        raise ValueError("unreadable: config.yaml holds no keys")
    return run


def _named(arm: str, folder: Path) -> Run:
    """A run given on the command line."""
    init = ARMS[arm][1]
    try:
        run = _read(folder)
    except ValueError as error:
        raise ValueError(f"--{arm} {folder}: {error}") from error
    if run.config.get("init") != init:
        raise ValueError(f"--{arm} {folder}: its config has init={run.config.get('init')!r}, expected {init!r}")
    if not run.records("train"):
        raise ValueError(f"--{arm} {folder}: no training step logged yet")
    return run


def _no_pair(root: Path, candidates: Mapping[str, list[Run]], problems: list[str]) -> str:
    keys = f"{', '.join(PAIR_KEYS[:-1])} and {PAIR_KEYS[-1]}"
    lines = [f"no run from pre-trained and run from random weights in {root} with equal {keys}"]
    found = [_row(run) for runs in candidates.values() for run in runs] + problems
    lines += ["runs found:", *(f"  {row}" for row in found)] if found else ["runs found: none"]
    mine, other = candidates["pretrained"], candidates["scratch"]
    combinations = [(one, two) for one in reversed(mine) for two in reversed(other)]
    if combinations:
        one, two = min(combinations, key=lambda both: len(mismatches(*both)))
        lines.append(f"nearest: {_label(one)} and {_label(two)} differ in")
        values = pair_values(one), pair_values(two)
        lines += [f"  {key}: {values[0][key]} and {values[1][key]}" for key in mismatches(one, two)]
        lines += ["to make the partner of the first:", f"  {_partner_command('scratch', one, two)}"]
    elif mine or other:
        arm, have = ("scratch", mine[-1]) if mine else ("pretrained", other[-1])
        lines.append(f"to make the partner of {_label(have)} (add any other key that you changed there):")
        lines.append(f"  {_partner_command(arm, have, None)}")
    else:
        lines += [
            "to make a pair:",
            *(f"  make {target} SCALE=demo" for _, _, target in ARMS.values()),
        ]
    return "\n".join(lines)


def _partner_command(arm: str, have: Run, near: Run | None) -> str:
    """The training of `arm` that would pair with `have`.

    It sets the keys in which `near` is wrong, or, without a near run, every key that must agree.
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


def _label(run: Run) -> str:
    return f"{run.folder.parent.name}/{run.folder.name}"


def _row(run: Run) -> str:
    state = "" if run.report is not None else f"  (unfinished, step {run.metrics[-1]['step']})"
    return f"{_label(run)}  " + "  ".join(f"{key}={value}" for key, value in pair_values(run).items()) + state

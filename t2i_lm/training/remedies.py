"""Runs of `python -m t2i_lm.remedies`: the pre-trained arm without a remedy, then with each, at its strengths."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from t2i_lm.comparison.plan import read_plan_file
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.file_kinds import STRENGTHS, require_kind
from t2i_lm.config.load import load_experiment
from t2i_lm.config.sections import require
from t2i_lm.runtime.command_line import NO_SAMPLES
from t2i_lm.training.equal_runs import compared_values
from t2i_lm.training.jobs import Job

BASE = Path("experiments/t2i_pretrained.yaml")
FOLDER = "remedies"  # beside the base experiment


def read_strengths(path: Path) -> dict[str, list[list[str]]]:
    """The strengths of a plan, as `key=value` strings of each run of a remedy, by its name.

    The file has one key, `strengths`: for each remedy, a list of values by config key. Lists of several keys have equal
    lengths and are taken together.

    Raises:
        ValueError: naming the file and the key.
    """
    content = read_plan_file(path)
    if isinstance(content, dict):
        require_kind(path, content, STRENGTHS)
    try:
        require(isinstance(content, dict) and list(content) == ["strengths"], "plan", content, "one key, strengths")
        remedies: Any = content["strengths"]
        require(isinstance(remedies, dict) and bool(remedies), "strengths", remedies, "keys and values by remedy")
        return {str(name): _settings(f"strengths.{name}", keys) for name, keys in remedies.items()}
    except ValueError as error:
        raise ValueError(f"--plan {path}: {error}") from error


def _settings(name: str, keys: Any) -> list[list[str]]:
    require(isinstance(keys, dict) and bool(keys), name, keys, "lists of values by config key")
    for key, values in keys.items():
        numbers = isinstance(values, list) and values and all(isinstance(value, int | float) for value in values)
        require(bool(numbers), f"{name}.{key}", values, "a list of numbers")
    require(len({len(values) for values in keys.values()}) == 1, name, keys, "lists of equal lengths")
    rows = zip(*keys.values(), strict=True)
    return [[f"{key}={value}" for key, value in zip(keys, row, strict=True)] for row in rows]


def remedy_jobs(
    text: str,
    replay: str | None,
    tasks: str | None,
    only: Sequence[str],
    scale: str,
    overrides: Sequence[str],
    base: Path = BASE,
    strengths: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> list[Job]:
    """The runs to train, the one without a remedy first. Prints which remedies are left out, and why.

    Args:
        text: held-out text that forgetting is measured on.
        replay: text to replay; without it, remedies that replay are left out.
        tasks: folder of questions that forgetting is measured on.
        only: names of remedies; empty for all.
        scale: name of the overlay.
        overrides: `key=value` strings for every arm.
        base: the experiment without a remedy.
        strengths: as of `read_strengths`; a remedy that it lacks has the values of its file.

    Raises:
        ValueError: on an unknown remedy, key or value, equal strengths, or a missing path.
    """
    strengths = strengths or {}
    files = {file.stem: file for file in sorted((base.parent / FOLDER).glob("*.yaml"))}
    if not files:
        raise ValueError(f"no remedies in {base.parent / FOLDER}")
    if replay is not None and Path(replay).resolve() == Path(text).resolve():
        raise ValueError(f"--replay {replay}: this is the text that --text measures on; give another one")
    for option, names in (("--only", only), ("--plan: strengths of", strengths)):
        for name in names:
            if name not in files:
                raise ValueError(f"{option} {name}: expected one of {', '.join(files)}")
    shared = [*NO_SAMPLES, f"forgetting.text={text}"]
    shared += [f"forgetting.tasks={tasks}"] if tasks else []
    shared += [f"data.replay_path={replay}"] if replay else []
    # By default, forgetting is measured whenever the run is validated.
    default = load_experiment(base, scale, [*shared, *overrides])
    shared.append(f"forgetting.interval={default.forgetting.interval or default.trainer.val_check_interval}")
    jobs: list[Job] = []
    seen: list[dict[str, object]] = []
    for file in [base, *(file for name, file in files.items() if not only or name in only)]:
        for settings in strengths.get(file.stem, [[]]):
            config = load_experiment(file, scale, [*shared, *settings, *overrides])
            if lacking := _lacking(config):
                print(f"left out: {config.name} requires {lacking}")
                break
            config.require_paths()
            if (values := compared_values(config)) in seen:
                raise ValueError(f"{' '.join(settings)}: two strengths of {config.name} are the same")
            seen.append(values)
            jobs.append(Job(config, label=" ".join(settings)))
    if not jobs:
        raise ValueError("every arm is left out, for what the lines above name")
    return jobs


def _lacking(config: ExperimentConfig) -> str | None:
    """An option or package that an arm requires and that is not there."""
    if config.data.replayed and config.data.replay_path is None:
        return "text to replay: --replay PATH"
    if config.lora.rank and find_spec("peft") is None:
        return "peft: pip install 't2i_lm[lora]'"
    return None

"""Runs of `python -m t2i_lm.sweep`: arms at several values of a config key."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from t2i_lm.config.load import experiment_names, flatten, load_experiment
from t2i_lm.config.sections import RunConfig
from t2i_lm.runtime.command_line import NO_SAMPLES
from t2i_lm.storage.run_folder import Run, read_run
from t2i_lm.training.jobs import Job, find_equal_run

FOLDER = Path("experiments")
ARMS = ("t2i_pretrained", "t2i_scratch")
# Folder of a sweep's runs, in `run.dir`.
RUNS = "sweep"
TASKS = ("text_to_image", "unconditional", "text")

# Arm, value of the swept key, values of other keys (`seed`).
SweepPoint = tuple[str, ...]


def split_keys(words: Sequence[str]) -> tuple[str, dict[str, list[str]], list[str]]:
    """The swept key, all values of keys with several (`key=value,value`), and the `key=value` strings of every run.

    Raises:
        ValueError: unless exactly one key beside `seed`, or `seed` alone, has several values.
    """
    several, fixed = dict[str, list[str]](), list[str]()
    for word in words:
        key, _, text = word.partition("=")
        values = [value for value in text.split(",") if value]
        if len(values) > 1 and not text.startswith(("[", "{", '"', "'")):
            several[key] = list(dict.fromkeys(values))
        else:
            fixed.append(word)
    swept = [key for key in several if key != "seed"] or list(several)
    if len(swept) != 1:
        problem = f"{' and '.join(swept)} have several values" if swept else "no key has several values"
        raise ValueError(f"{problem}: expected one, such as optim.lr=3e-3,6e-3, and seed beside it")
    return swept[0], several, fixed


def sweep_jobs(
    words: Sequence[str], arms: Sequence[str], scale: str, folder: Path = FOLDER
) -> tuple[str, dict[SweepPoint, Job]]:
    """The swept key, and a job for every arm, value and seed.

    Args:
        words: `key=value[,value...]` strings.
        arms: names of experiments in `folder`.
        scale: name of the overlay.
        folder: folder of experiments.

    Raises:
        ValueError: on an unknown arm, key or value, a missing path, or equal values.
    """
    key, several, fixed = split_keys(words)
    order = [key, *(other for other in several if other != key)]
    jobs: dict[SweepPoint, Job] = {}
    seen: list[dict[str, object]] = []
    for arm, *values in product(dict.fromkeys(arms), *(several[name] for name in order)):
        file = folder / f"{arm}.yaml"
        if not file.is_file():
            raise ValueError(f"--arm {arm}: expected one of {', '.join(experiment_names(folder))}")
        point = [f"{name}={value}" for name, value in zip(order, values, strict=True)]
        config = load_experiment(file, scale, [*NO_SAMPLES, *fixed, *point])
        config = replace(config, run=RunConfig(str(Path(config.run.dir) / RUNS)))
        config.require_paths()
        if config.task not in TASKS:
            raise ValueError(f"--arm {arm}: task={config.task} has no loss of text or image tokens")
        if (settings := flatten(config)) in seen:
            raise ValueError(f"{' '.join(point)}: two of the values are the same")
        seen.append(settings)
        jobs[arm, *values] = Job(config, label=" ".join(point))
    return key, jobs


def finished_runs(jobs: Mapping[SweepPoint, Job]) -> dict[SweepPoint, Run]:
    """The finished runs of a sweep; the others are named on stderr."""
    runs = {}
    for point, job in jobs.items():
        folder, finished = find_equal_run(job.config)
        if folder is not None and finished:
            runs[point] = read_run(folder)
        else:
            print(f"not drawn: {job.name} has not finished", file=sys.stderr)
    return runs

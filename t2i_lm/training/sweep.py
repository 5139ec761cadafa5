"""Runs of `python -m t2i_lm.sweep`: arms at several values of one or two config keys."""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from t2i_lm.comparison.study_plan import BATCH_SIZE, IN_STEPS, STEPS
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.key_groups import COMPARED, is_compared
from t2i_lm.config.load import experiment_names, flatten, load_experiment
from t2i_lm.config.sections import RunConfig, require
from t2i_lm.runtime.command_line import NO_SAMPLES
from t2i_lm.storage.run_folder import Run, read_run
from t2i_lm.training.equal_runs import find_equal_run
from t2i_lm.training.jobs import Job

FOLDER = Path("experiments")
ARMS = ("t2i_pretrained", "t2i_scratch")
# Folder of a sweep's runs, in `run.dir`.
RUNS = "sweep"
TASKS = ("text_to_image", "unconditional", "text")

# Arm, values of the swept keys, values of other keys (`seed`).
SweepPoint = tuple[str, ...]


def split_keys(words: Sequence[str]) -> tuple[tuple[str, ...], dict[str, list[str]], list[str]]:
    """The swept keys, all values of keys with several (`key=value,value`), and the `key=value` strings of every run.

    Raises:
        ValueError: unless one or two keys beside `seed`, or `seed` alone, have several values, and runs with other
            values are other runs; if a key with several values is given again.
    """
    several, fixed, given = dict[str, list[str]](), list[str](), dict[str, str]()
    for word in words:
        key, _, text = word.partition("=")
        values = [value for value in text.split(",") if value]
        has_several = len(values) > 1 and not text.startswith(("[", "{", '"', "'"))
        if key in several or (has_several and key in given):
            raise ValueError(f"{word}: {given[key]} is given, too; give all values of a swept key in one list")
        given[key] = word
        if has_several:
            several[key] = list(dict.fromkeys(values))
        else:
            fixed.append(word)
    swept = [key for key in several if key != "seed"] or list(several)
    if not 1 <= len(swept) <= 2:
        problem = f"{', '.join(swept)} have several values" if swept else "no key has several values"
        raise ValueError(f"{problem}: expected one or two, such as optim.lr=3e-3,6e-3, and seed beside them")
    for key in swept:
        require(is_compared(key), key, ",".join(several[key]), COMPARED)
    return tuple(swept), several, fixed


def sweep_jobs(
    words: Sequence[str], arms: Sequence[str], scale: str, folder: Path = FOLDER, equal_tokens: bool = True
) -> tuple[tuple[str, ...], dict[SweepPoint, Job]]:
    """The swept keys, and a job for every arm, value and seed.

    Args:
        words: `key=value[,value...]` strings.
        arms: names of experiments in `folder`.
        scale: name of the overlay.
        folder: folder of experiments.
        equal_tokens: a swept batch size changes the steps, so that all runs see as many samples.

    Raises:
        ValueError: on an unknown arm, key or value, a missing path, or equal values.
    """
    keys, several, fixed = split_keys(words)
    order = [*keys, *(other for other in several if other not in keys)]
    rescaled = equal_tokens and BATCH_SIZE in keys and STEPS not in keys
    jobs: dict[SweepPoint, Job] = {}
    unswept: dict[str, ExperimentConfig] = {}
    seen: list[dict[str, object]] = []
    for arm, *values in product(dict.fromkeys(arms), *(several[name] for name in order)):
        file = folder / f"{arm}.yaml"
        if not file.is_file():
            names = experiment_names(folder)
            expected = f"expected one of {', '.join(names)}" if names else f"no experiments in {folder.absolute()}"
            raise ValueError(f"--arm {arm}: {expected}")
        point = [f"{name}={value}" for name, value in zip(order, values, strict=True)]
        overrides = [*NO_SAMPLES, *fixed, *point]
        config = load_experiment(file, scale, overrides)
        if rescaled:
            if arm not in unswept:
                unswept[arm] = load_experiment(file, scale, [*NO_SAMPLES, *fixed])
            given = {word.partition("=")[0] for word in (*fixed, *point)}
            config = load_experiment(file, scale, [*overrides, *_at_equal_tokens(config, unswept[arm], given)])
        config = replace(config, run=RunConfig(str(Path(config.run.dir) / RUNS)))
        config.require_paths()
        if config.task not in TASKS:
            raise ValueError(f"--arm {arm}: task={config.task} has no loss of text or image tokens")
        if (settings := flatten(config)) in seen:
            raise ValueError(f"{' '.join(point)}: two of the values are the same")
        seen.append(settings)
        jobs[arm, *values] = Job(config, label=" ".join(point))
    return keys, jobs


def _at_equal_tokens(config: ExperimentConfig, unswept: ExperimentConfig, given: Collection[str]) -> list[str]:
    """Overrides of the steps of a run with another batch size than the experiment's, without keys that were given.

    Raises:
        ValueError: if the samples of the experiment are no multiple of the batch size.
    """
    samples, size = unswept.trainer.max_steps * unswept.data.batch_size, config.data.batch_size
    if samples % size:
        raise ValueError(
            f"{BATCH_SIZE}={size}: {samples:,} samples, those of {unswept.trainer.max_steps:,} steps of "
            f"{unswept.data.batch_size}, are no multiple of it; --equal steps compares at equal steps"
        )
    following = in_proportion(config, unswept.data.batch_size / size)
    return [f"{STEPS}={samples // size}", *(word for word in following if word.partition("=")[0] not in given)]


def in_proportion(config: ExperimentConfig, ratio: float) -> list[str]:
    """Overrides of the keys in steps, beside the steps themselves, for a run of `ratio` times as many steps."""
    values = flatten(config)
    scaled = {key: max(1, round(values[key] * ratio)) for key in IN_STEPS if values[key]}
    return [f"{key}={value}" for key, value in scaled.items()]


def finished_runs(jobs: Mapping[SweepPoint, Job]) -> dict[SweepPoint, Run]:
    """The finished runs of a sweep; the others are named on stderr."""
    runs = {}
    for point, job in jobs.items():
        folder, finished = find_equal_run(job.config)
        run = read_run(folder) if folder is not None and finished else None
        if run is not None and not run.nonfinite:
            runs[point] = run
        else:
            reason = "has not finished" if run is None else f"has {run.nonfinite_words}"
            print(f"not drawn: {job.name} {reason}", file=sys.stderr)
    return runs

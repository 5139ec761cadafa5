"""Expected time of a study's runs, by the time per step of finished ones, or of steps on this machine."""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from t2i_lm.assets import find
from t2i_lm.comparison.comparability import config_values
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import flatten
from t2i_lm.config.sections import require
from t2i_lm.storage.reading import reason
from t2i_lm.storage.run_folder import REPORT, Run, folders_below, read_run
from t2i_lm.training.step_time import step_seconds, steps_in_all
from t2i_lm.training.study import Progress, StudyRun

# Runs with equal values of these, and backbones of equal size, take about as long per step.
ALIKE = ("scale", "task", "data.batch_size", "data.length", "image_tokenizer.size")
SIZE = ("hidden_dim", "n_layers", "n_heads", "vocab_size")  # of a backbone's config.json


def estimate(runs: Sequence[StudyRun], states: Sequence[Progress], jobs: int) -> str:
    """Number, steps and expected time of the runs that are not finished.

    The time per step of a run is that of the study's finished runs: of its experiment and setting, else of alike ones,
    else of all. Before any is finished, it is that of alike runs elsewhere below `run.dir`, else of steps timed here.
    Runs in parallel share the processor, which measured times include; steps are timed on all of its cores.
    """
    require(jobs >= 1, "--jobs", jobs, "at least 1")
    waiting = [run.job.config for run, state in zip(runs, states, strict=True) if not state.finished]
    left = [flatten(config) for config in waiting]
    if not left:
        return f"all {len(runs)} runs are finished"
    steps = sum(values["trainer.max_steps"] for values in left)
    words = f"{len(left)} of {len(runs)} runs to train, {steps:,} steps"
    folders = [state.folder for state in states if state.finished and state.folder is not None]
    done = _times(read_run(folder) for folder in folders)
    if done:
        source = f"{len(done)} finished runs"
    else:
        done = _alike_elsewhere(Path(runs[0].job.config.run.dir), {_kind(values) for values in left})
        newest = max((folder for folder, _, _ in done), key=lambda folder: folder.name, default=None)
        source = f"{len(done)} finished runs of the same scale and size outside of the study, the newest {newest}"
    if not done:
        total = _timed(waiting)
        about = "their time is estimated once a run is finished"
        if total is not None:
            about = f"about {timedelta(seconds=round(total))}, by training steps timed on this machine"
        return f"{words}; {about}"
    everything = [seconds for _, _, seconds in done]
    total = 0.0
    for values in left:
        own = [seconds for _, other, seconds in done if _setting(other) == _setting(values)]
        alike = [seconds for _, other, seconds in done if _kind(other) == _kind(values)]
        total += fmean(own or alike or everything) * values["trainer.max_steps"]
    parallel = f" with --jobs {jobs}" if jobs > 1 else ""
    return f"{words}; about {timedelta(seconds=round(total / jobs))}{parallel}, by {source}"


def _timed(configs: Sequence[ExperimentConfig]) -> float | None:
    """Seconds of runs by the time of a step of each kind, or the mean of all for runs whose step is not timed."""
    steps: dict[str, float] = {}
    examples: dict[str, ExperimentConfig] = {}
    for config in configs:
        kind = _kind(flatten(config))
        steps[kind] = steps.get(kind, 0.0) + steps_in_all(config)
        examples.setdefault(kind, config)
    print("no run is finished yet: timing some training steps", file=sys.stderr, flush=True)
    seconds = {kind: _step_seconds(config) for kind, config in examples.items()}
    known = [value for value in seconds.values() if value is not None]
    if not known:
        return None
    return sum(steps[kind] * (fmean(known) if value is None else value) for kind, value in seconds.items())


def _step_seconds(config: ExperimentConfig) -> float | None:
    try:
        return step_seconds(config)
    except Exception as error:  # an estimate alone: absent files, too little memory, a plug-in's error
        print(f"note: {config.name} is not timed: {reason(error)}", file=sys.stderr)
        return None


# Folder, config values and seconds per step of a finished run.
Timed = tuple[Path, Mapping[str, Any], float]


def _times(runs: Any) -> list[Timed]:
    return [
        (run.folder, config_values(run), run.report["wall_s"] / run.report["steps"])
        for run in runs
        if run.report is not None and run.report.get("wall_s") and run.report.get("steps")
    ]


def _alike_elsewhere(study: Path, kinds: set[str]) -> list[Timed]:
    """Finished runs of given kinds below `run.dir`, outside of the study."""
    top = next((folder.parent for folder in (study, *study.parents) if folder.name == "study"), study)
    found: list[Run] = []
    for folder in sorted(folders_below(top)):
        try:
            if (folder / REPORT).is_file():
                run = read_run(folder)
                if _kind(config_values(run)) in kinds:
                    found.append(run)
        except (ValueError, OSError, KeyError, TypeError):  # damaged: named where it is used
            continue
    return _times(found)


def _setting(values: Mapping[str, Any]) -> str:
    """Everything that decides the time per step of a run's arm, and whatever else it has, beside seed and length."""
    left_out = ("seed", "run.dir", "trainer.max_steps", "trainer.threads", "samples.", "log.", "data.cache_dir")
    return repr(sorted((key, str(value)) for key, value in values.items() if not key.startswith(left_out)))


def _kind(values: Mapping[str, Any]) -> str:
    return repr([*(values[key] for key in ALIKE), _size(str(values["backbone.path"]), str(values["backbone.config"]))])


@cache
def _size(path: str, config: str) -> str:
    """What identifies the size of a backbone: numbers of its config.json, else its path and the name of its config."""
    try:
        folder = find(path) or Path(path)
        numbers = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return repr([numbers[name] for name in SIZE])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path} {config}"

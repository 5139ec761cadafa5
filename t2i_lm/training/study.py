"""Runs of `python -m t2i_lm.study`: the arms, seeds and settings of a plan; which exist, and what the rest costs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from t2i_lm.comparison.arms import Arms, pair_arms, unfinished
from t2i_lm.comparison.comparison import Comparison, make_comparison
from t2i_lm.comparison.plan import Plan, Study, setting_folder, setting_words
from t2i_lm.comparison.tables import as_json, text
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import experiment_names, flatten, load_experiment
from t2i_lm.config.sections import RunConfig
from t2i_lm.runtime.command_line import NO_SAMPLES
from t2i_lm.runtime.tables import text_table
from t2i_lm.storage.run_folder import Run, read_run
from t2i_lm.storage.writing import write_atomic
from t2i_lm.training.jobs import Job, find_equal_run, run_jobs

# Folder of a study's runs, in `run.dir`.
RUNS = "study"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: the comparisons and groups that need it, its arm and seed, and the job that trains it."""

    uses: tuple[str, ...]
    arm: str
    seed: int
    job: Job


@dataclass(frozen=True)
class Progress:
    """State of a run: its folder, and whether it is finished; None where it has not been started."""

    folder: Path | None
    finished: bool

    def __str__(self) -> str:
        return "finished" if self.finished else "interrupted" if self.folder else "missing"


def study_runs(study: Study, experiments: Path, overrides: Sequence[str] = ()) -> list[StudyRun]:
    """The runs of a study, each once, seed by seed, so that an interrupted study has complete pairs.

    The first seed generates samples as its experiments say, the others none.

    Args:
        study: the plan.
        experiments: folder of experiment files.
        overrides: `key=value` strings of every run; a setting's own values win.

    Raises:
        ValueError: on an unknown experiment, key or value, or a missing path.
    """
    needed = [(name, plan.arms, plan.seeds, plan.scale, plan.where) for name, plan in study.plans().items()]
    needed += [(name, one.arms, one.seeds, study.scale, one.where) for name, one in study.groups().items()]
    runs: dict[str, StudyRun] = {}
    for seed in dict.fromkeys(seed for _, _, seeds, _, _ in needed for seed in seeds):
        for name, arms, seeds, scale, where in needed:
            for arm in arms if seed in seeds else ():
                words = setting_words(where)
                quiet = () if seed == study.seeds[0] else NO_SAMPLES
                config = _load(experiments, arm, scale, [*quiet, *overrides, *words, f"seed={seed}"])
                config = _place(config, words)
                key = repr(flatten(config))
                uses = (*runs[key].uses, name) if key in runs else (name,)
                runs[key] = StudyRun(uses, arm, seed, Job(config, label=" ".join([*words, f"seed={seed}"])))
    return list(runs.values())


def _load(experiments: Path, arm: str, scale: str, words: Sequence[str]) -> ExperimentConfig:
    file = experiments / f"{arm}.yaml"
    if not file.is_file():
        names = experiment_names(experiments)
        raise ValueError(f"arms: no experiment {arm}; expected one of {', '.join(names)}")
    return load_experiment(file, scale, words)


def _place(config: ExperimentConfig, setting: Sequence[str]) -> ExperimentConfig:
    """The config with the run directory of its setting: runs of another setting never serve a figure."""
    folder = Path(config.run.dir) / RUNS / setting_folder(setting)
    config = replace(config, run=RunConfig(str(folder)))
    if config.aligned_rows is None:  # else a run of this study makes the file
        config.require_paths()
    return config


def progress_of(runs: Sequence[StudyRun]) -> list[Progress]:
    """The state of each run."""
    return [Progress(*_find(run.job.config)) for run in runs]


def _find(config: ExperimentConfig) -> tuple[Path | None, bool]:
    try:
        return find_equal_run(config)
    except ValueError:  # aligned rows that a run of this study has yet to make
        return None, False


def progress_table(runs: Sequence[StudyRun], states: Sequence[Progress]) -> str:
    """A line for each arm of each comparison, a column for each seed."""
    seeds = sorted({run.seed for run in runs})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for run, state in zip(runs, states, strict=True):
        for use in run.uses:
            cells.setdefault((use, run.arm), {})[run.seed] = str(state)
    header = ("", "arm", *(f"seed {seed}" for seed in seeds))
    rows = [(*names, *(by_seed.get(seed, "") for seed in seeds)) for names, by_seed in cells.items()]
    return text_table(header, rows, left=range(len(header)))


def estimate(runs: Sequence[StudyRun], states: Sequence[Progress], jobs: int) -> str:
    """Number, tokens and expected time of the runs that are not finished, by the time of finished ones."""
    left = [run.job.config for run, state in zip(runs, states, strict=True) if not state.finished]
    if not left:
        return f"all {len(runs)} runs are finished"
    done = [state.folder for state in states if state.finished and state.folder is not None]
    times = [report["wall_s"] / report["steps"] for report in (read_run(folder).report for folder in done) if report]
    steps = sum(config.trainer.max_steps for config in left)
    words = f"{len(left)} of {len(runs)} runs to train, {steps:,} steps"
    if not times:
        return f"{words}; their time is estimated once a run is finished"
    seconds = sum(times) / len(times) * steps  # runs in parallel share the processor: measured times include that
    parallel = f" with --jobs {jobs}" if jobs > 1 else ""
    return f"{words}; about {timedelta(seconds=round(seconds / jobs))}{parallel}, by {len(times)} finished runs"


def train(runs: Sequence[StudyRun], jobs: int) -> int:
    """Trains the runs that are not finished, those that start from aligned rows last; returns the exit code."""
    code = 0
    for aligned in (False, True):  # aligned rows are made by runs before
        phase = [run for run in runs if (run.job.config.aligned_rows is not None) == aligned]
        states = progress_of(phase)
        remaining = [
            replace(run.job, folder=state.folder)
            for run, state in zip(phase, states, strict=True)
            if not state.finished
        ]
        if remaining:
            code = run_jobs(remaining, jobs, keep_going=True) or code
        if code > 128:  # stopped by a signal
            break
    return code


def figure_runs(runs: Sequence[StudyRun]) -> Path:
    """Folder of the runs that the figures show: those without a setting of their own."""
    return min((Path(run.job.config.run.dir) for run in runs), key=lambda folder: len(folder.parts))


def shown_runs(runs: Sequence[StudyRun]) -> tuple[list[Run], list[str]]:
    """The finished runs that the figures show, oldest first, and notes on those that are not finished."""
    folder = figure_runs(runs)
    states = progress_of([run for run in runs if Path(run.job.config.run.dir) == folder])
    started = [(read_run(state.folder), state.finished) for state in states if state.folder is not None]
    finished = sorted((run for run, done in started if done), key=lambda run: run.folder.name)
    return finished, [unfinished(run) for run, done in started if not done]


def compare_arms(study: Study, runs: Sequence[StudyRun], strict: bool = True) -> list[Comparison]:
    """Every comparison of a study; one that cannot be made has its reason.

    Args:
        study: the plan.
        runs: its runs.
        strict: whether another order of the data between the arms is refused.
    """
    return [
        make_comparison(name, plan, partial(_arms, name, plan, runs, strict)) for name, plan in study.plans().items()
    ]


def write_comparisons(comparisons: Sequence[Comparison], out: Path) -> int:
    """Prints the table of every comparison and writes it as OUT/NAME.txt and NAME.json.

    Returns:
        0, or 2 if a comparison cannot be made, after naming the reason on stderr.
    """
    out.mkdir(parents=True, exist_ok=True)
    code = 0
    for one in comparisons:
        if one.arms is None:
            print(f"{one.name}: {one.problem}", file=sys.stderr)
            code = 2
            continue
        table = text(one.plan, one.arms, one.results)
        write_atomic(out / f"{one.name}.txt", f"{table}\n")
        write_atomic(out / f"{one.name}.json", f"{as_json(one.plan, one.arms, one.results)}\n")
        print(f"== {one.name}", table, "", sep="\n", flush=True)
    return code


def _arms(name: str, plan: Plan, runs: Sequence[StudyRun], strict: bool) -> Arms:
    """The finished runs of a comparison."""
    own = [run for run in runs if name in run.uses]
    found: dict[str, list[Run]] = {arm: [] for arm in plan.arms}
    notes = []
    for run, state in zip(own, progress_of(own), strict=True):
        if state.folder is not None and state.finished:
            found[run.arm].append(read_run(state.folder))
        elif state.folder is not None:
            notes.append(unfinished(read_run(state.folder)))
    return pair_arms(plan, found, notes, Path(own[0].job.config.run.dir), strict)

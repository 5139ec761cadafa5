"""Runs of `python -m t2i_lm.study`: the arms, seeds and settings of a plan; which exist, and what they answer."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from t2i_lm.comparison.arms import Arms, pair_arms, unfinished
from t2i_lm.comparison.comparison import Comparison, make_comparison
from t2i_lm.comparison.endpoints import RELEARNING
from t2i_lm.comparison.plan import Arm, Plan, one_spelling, setting_folder, setting_in_one_spelling, setting_words
from t2i_lm.comparison.relearning import is_measured
from t2i_lm.comparison.study_plan import STEPS, Needed, Study
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.key_groups import COMPARED
from t2i_lm.config.load import experiment_names, flatten, load_experiment
from t2i_lm.config.sections import RunConfig, require
from t2i_lm.config.values import Plain, read_value
from t2i_lm.runtime.command_line import NO_SAMPLES
from t2i_lm.runtime.launch import global_rank
from t2i_lm.runtime.tables import text_table
from t2i_lm.storage.run_folder import Run, folders_below, in_order, is_collected, read_run
from t2i_lm.training.equal_runs import compared_values, find_equal_run, require_no_results
from t2i_lm.training.jobs import Job, run_jobs
from t2i_lm.training.sweep import in_proportion

# Folder of a study's runs, in `run.dir`.
RUNS = "study"
SAMPLES = "samples."
# In the name of the folder of runs that are trained once more with other threads.
THREADS = "trainer.threads"


@dataclass(frozen=True)
class Role:
    """What a run is in a comparison or group.

    Attributes:
        group: name of the comparison over its whole grid, or of the group.
        arm: with the values of its own.
        point: values of the grid's keys in words; empty without a grid.
        shown: whether figures show it in any case: an experiment by its own name, without another setting for all arms
            but one of the whole study (`shown_runs`).
    """

    group: str
    arm: Arm
    point: str
    shown: bool


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        roles: by the comparison or group that needs it.
        seed: its seed.
        job: what trains it.
        results: folder of collected results, of which a finished run stands for it; None for none.
        repeats: whether it is another one of the study once more, with other threads and in a folder of its own: they
            do not stand for each other.
        sampled: whether an endpoint of a comparison that needs it is measured on samples.
    """

    roles: Mapping[str, Role]
    seed: int
    job: Job
    results: Path | None = None
    repeats: bool = False
    sampled: bool = False

    @property
    def uses(self) -> tuple[str, ...]:
        """Names of the comparisons and groups that need it."""
        return tuple(self.roles)


@dataclass(frozen=True)
class Progress:
    """State of a run: its folder, and whether it is finished; None where it has not been started."""

    folder: Path | None
    finished: bool

    def __str__(self) -> str:
        return "finished" if self.finished else "interrupted" if self.folder else "missing"


def experiments_of(plan: Path) -> Path:
    """The folder of experiments of a plan file: its own, or the one above, as of experiments/plans."""
    return next(
        (folder for folder in (plan.parent, plan.resolve().parent.parent) if (folder / "base.yaml").is_file()),
        plan.parent,
    )


def study_runs(
    study: Study,
    experiments: Path,
    overrides: Sequence[str] = (),
    results: Path | None = None,
    seeds: int | None = None,
) -> list[StudyRun]:
    """The runs of a study, each config once, seed by seed, so that an interrupted study has complete pairs.

    Comparisons of fewer seeds than others come last.

    Samples are generated as the experiments say for the first seed of the first comparison, which the report shows, and
    for every run of a comparison whose endpoints are measured on them; other runs and points of a grid have none. Where
    a comparison sets `trainer.max_steps`, or a grid is over it, the keys in IN_STEPS follow in proportion.

    Args:
        study: the plan.
        experiments: folder of experiment files.
        overrides: `key=value` strings of every run; a setting's own values win.
        results: folder of collected results, or the one of a study's in it, whose runs are not trained again.
        seeds: number of seeds of each comparison and group, the first ones; None for all.

    Raises:
        ValueError: on an unknown experiment, key or value, an override of what the plan sets for every run, a path that
            is not set, a folder without results of a study, or more seeds than the plan has.
    """
    collected = None if results is None else _collected(results)
    needed = study.needed(seeds)
    _require_effect(overrides, needed)
    runs: dict[str, StudyRun] = {}
    of_arms: dict[tuple[str, int, str], str] = {}
    most = max((len(one.seeds) for one in needed), default=0)
    few = {one.group for one in needed if len(one.seeds) < most} & study.comparisons.keys()
    order = list(dict.fromkeys(seed for one in needed for seed in one.seeds))
    plans = study.plans()
    sampled = {name for name, plan in plans.items() if any(one.setting_keys for one in plan.endpoints)}
    first = next((one.group for one in needed if not one.point), None)
    everywhere = set.intersection(*(_numbers_alike(one.where) - _numbers_alike(one.point) for one in needed))
    turns = [(one.group in few, order.index(seed), seed, one) for one in needed for seed in one.seeds]
    for *_, seed, one in sorted(turns, key=itemgetter(0, 1)):
        for arm in one.arms:
            shown = one.group == first and seed == one.seeds[0] and not one.point
            quiet = () if shown or one.use in sampled else NO_SAMPLES
            config, words = _configure(experiments, arm, one, [*quiet, *overrides])
            config = replace(config, seed=seed)
            if config.aligned_rows is None:  # else a run of this study makes the file
                config.require_paths()
            content = {name: value for name, value in flatten(config).items() if not name.startswith(SAMPLES)}
            key = repr({**content, "run.dir": None})  # a value in two spellings is one run
            values = {name: value for name, value in compared_values(config).items() if name != "name"}
            other = of_arms.setdefault((one.use, seed, repr((values, one.point))), arm.name)
            if other != arm.name:
                arms = f"the arms {other} and {arm.name}"
                raise ValueError(f"{one.use}: {arms} have equal configs; expected arms that differ in {COMPARED}")
            before = runs[key].roles if key in runs else {}
            measured = any(use in sampled for use in (*before, one.use))
            rest = [word for word in words if word.partition("=")[0] not in arm.own]
            others = [word for word in rest if one_spelling(word) not in everywhere]
            plain = arm.name == arm.experiment and not others
            role = Role(one.group, arm, " ".join(setting_words(one.point)), plain)
            job = Job(config, label=" ".join([*words, f"seed={seed}"]))
            # A run with samples serves where none are needed, too.
            kept = runs[key].job if key in runs and quiet else job
            runs[key] = StudyRun({**before, one.use: role}, seed, kept, collected, sampled=measured)
    return [*runs.values(), *_repeats([*runs.values()], needed[0], study.rounding)]


def _numbers_alike(values: Mapping[str, Any]) -> set[str]:
    return set(map(one_spelling, setting_words(values)))


def _collected(results: Path) -> Path:
    """The folder of a study's runs in collected results, which may be named itself."""
    if (results / RUNS).is_dir():
        return results / RUNS
    if not results.is_dir():
        raise ValueError(f"--results {results}: no such folder")
    if results.absolute().name != RUNS:
        raise ValueError(
            f"--results {results}: expected a folder that holds {RUNS}, or {RUNS} itself, of collected results"
        )
    return results


def _require_effect(overrides: Sequence[str], needed: Sequence[Needed]) -> None:
    """Refuses an override that changes no run, and names on stderr the comparisons in which one changes none."""
    for word in overrides:
        key = word.partition("=")[0]
        require(key != "seed", "seed", word.partition("=")[2], "--seeds N with a study, whose plan names the seeds")
        groups = {one.group for one in needed}
        changed = {one.group for one in needed if not all(key in {**one.where, **arm.own} for arm in one.arms)}
        if not changed:
            raise ValueError(f"{word}: no effect on any run, the plan sets {key} itself; change it there")
        if changed < groups and global_rank() == 0:
            unchanged = ", ".join(sorted(groups - changed))
            print(f"note: {word} has no effect in {unchanged}, where the plan sets {key}", file=sys.stderr)


def _repeats(runs: Sequence[StudyRun], first: Needed, threads: int | None) -> Iterator[StudyRun]:
    """The first seed's runs of a study's first comparison, at its first point, once more with some number of threads.

    Raises:
        ValueError: if all runs have as many.
    """
    place = (first.group, " ".join(setting_words(first.point)))
    for run in runs if threads is not None else ():
        config, word = run.job.config, f"{THREADS}={threads}"
        expected = "another number than trainer.threads, which all runs have"
        require(config.trainer.threads != threads, "rounding", threads, expected)
        roles = {use: role for use, role in run.roles.items() if (role.group, role.point) == place}
        if roles and run.seed == first.seeds[0]:
            own = Path(config.run.dir)
            folder = _root(run) / setting_folder([*([] if own == _root(run) else [own.name]), word])
            trainer = replace(config.trainer, threads=threads)
            job = Job(replace(config, trainer=trainer, run=RunConfig(str(folder))), label=f"{run.job.label} {word}")
            yield replace(run, roles=roles, job=job, repeats=True)


def _configure(
    experiments: Path, arm: Arm, needed: Needed, overrides: Sequence[str]
) -> tuple[ExperimentConfig, list[str]]:
    """The config of a run in the folder of its setting, and the values by which it differs from its experiment's.

    Raises:
        ValueError: on an unknown experiment, key or value.
    """
    file = experiments / f"{arm.experiment}.yaml"
    if not file.is_file():
        names = experiment_names(experiments)
        raise ValueError(f"arms: no experiment {arm.experiment} in {experiments}; expected one of {', '.join(names)}")
    plain = _load(file, needed.scale, *overrides)
    own = {**needed.where, **arm.own}
    follows = []
    if STEPS in needed.where:
        steps = own[STEPS]  # not loaded alone: few steps are less than the warm-up before it follows
        steps = read_value(STEPS, Plain(steps) if isinstance(steps, str) else steps)
        follows = [
            word for word in in_proportion(plain, steps / plain.trainer.max_steps) if word.partition("=")[0] not in own
        ]
    config = _load(file, needed.scale, *overrides, *follows, *setting_words(own))
    before, after = flatten(plain), flatten(config)
    words = setting_words({key: value for key, value in own.items() if after[key] != before[key]})
    return replace(config, run=RunConfig(str(Path(config.run.dir) / RUNS / setting_folder(words)))), words


@cache
def _load(file: Path, scale: str, *overrides: str) -> ExperimentConfig:
    return load_experiment(file, scale, overrides)


def progress_of(runs: Sequence[StudyRun]) -> list[Progress]:
    """The state of each run; a run of an equal config in the folder of another setting stands for it."""
    folders: dict[Path, list[Path]] = {}
    states = []
    for run in runs:
        roots = [root for root in (run.results, _root(run)) if root is not None]
        for root in roots:
            if root not in folders:
                folders[root] = in_order(folders_below(root))
        states.append(Progress(*_find(run, [folder for root in roots for folder in folders[root]])))
    return states


def _root(run: StudyRun) -> Path:
    """The folder of a study's runs, that of every setting included."""
    folder = Path(run.job.config.run.dir)
    return folder if folder.name == RUNS else folder.parent


def _find(run: StudyRun, folders: Sequence[Path]) -> tuple[Path | None, bool]:
    config = run.job.config
    name, own = Path(config.name).name, setting_in_one_spelling(Path(config.run.dir).name)

    def may_serve(folder: Path) -> bool:
        setting = setting_in_one_spelling(folder.parents[1].name)
        return folder.parent.name == name and (setting == own or not (run.repeats or THREADS in setting))

    of_name = [*filter(may_serve, folders)]
    try:
        found = find_equal_run(config, of_name)
        if not found[1] and not run.sampled:
            # A finished run with samples serves where none are needed, and a collected one, which is drawn without
            # training, also without samples.
            others = of_name if config.samples.prompts == 0 else [*filter(is_collected, of_name)]
            other = find_equal_run(config, others, (SAMPLES,))
            return other if other[1] else found
        return found
    except ValueError:
        if config.aligned_rows is None:
            raise
        return None, False  # a run of this study has yet to make the rows


def progress_table(runs: Sequence[StudyRun], states: Sequence[Progress]) -> str:
    """A line for each arm of each comparison at each point of its grid, a column for each seed."""
    seeds = sorted({run.seed for run in runs})
    cells: dict[tuple[str, str, str], dict[int, str]] = {}
    for run, state in zip(runs, states, strict=True):
        for role in run.roles.values():
            own = " ".join(setting_words(role.arm.own))
            again = f"{THREADS}={run.job.config.trainer.threads}" if run.repeats else ""
            setting = " ".join(filter(None, [role.point, own, again]))
            cells.setdefault((role.group, role.arm.name, setting), {})[run.seed] = str(state)
    groups = list(dict.fromkeys(group for group, _, _ in cells))
    cells = dict(sorted(cells.items(), key=lambda cell: groups.index(cell[0][0])))
    settings = any(setting for _, _, setting in cells)
    header = ("", "arm", *(["setting"] if settings else []), *(f"seed {seed}" for seed in seeds))
    rows = [
        (name, arm, *([setting] if settings else []), *(by_seed.get(seed, "") for seed in seeds))
        for (name, arm, setting), by_seed in cells.items()
    ]
    return text_table(header, rows, left=range(len(header)))


def train(runs: Sequence[StudyRun], jobs: int) -> int:
    """Trains the runs that are not finished, those that start from aligned rows last; returns the exit code.

    Raises:
        ValueError: before anything is trained, naming a folder of collected results that runs would be trained in;
            before runs from aligned rows, if there are none.
    """
    states = progress_of(runs)
    require_no_results({_root(run) for run, state in zip(runs, states, strict=True) if not state.finished})
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
            code = run_jobs(remaining, jobs) or code
        if code > 128:  # stopped by a signal
            break
    return code


def without_relearning(study: Study, runs: Sequence[StudyRun]) -> list[Path]:
    """Finished runs with checkpoints of which a comparison has an endpoint of relearning that was not measured."""
    measured = {name for name, plan in study.plans().items() if any(one.source == RELEARNING for one in plan.endpoints)}
    folders = [
        state.folder
        for run, state in zip(runs, progress_of(runs), strict=True)
        if state.finished and state.folder is not None and measured.intersection(run.uses)
    ]
    return [folder for folder in folders if not is_collected(folder) and not is_measured(read_run(folder))]


def figure_root(runs: Sequence[StudyRun]) -> Path:
    """The folder of a study's runs; of collected ones where there is no other."""
    root, results = _root(runs[0]), runs[0].results
    return results if results is not None and not root.is_dir() else root


def shown_runs(runs: Sequence[StudyRun]) -> tuple[list[Run], list[str]]:
    """The finished runs that the figures show, oldest first, and notes on those that are not finished.

    Those of experiments without a setting for all arms; of a comparison or group whose experiments are nowhere without
    one, its first setting; no repetitions. A study whose arms all have names of their own shows its first comparison.
    """
    runs = [run for run in runs if not run.repeats]
    everything = [(run, role) for run in runs for role in run.roles.values()]
    plain = {role.arm.experiment for _, role in everything if role.shown}
    groups: dict[str, list[Role]] = {}
    for _, role in everything:
        groups.setdefault(role.group, []).append(role)
    first: dict[str, str] = {}
    for group, several in groups.items():
        experiments = {role.arm.experiment for role in several}
        if not experiments & plain and all(role.arm.name == role.arm.experiment for role in several):
            first[group] = several[0].point
            plain |= experiments  # shown in no other setting

    def is_shown(role: Role) -> bool:
        return role.shown or first.get(role.group) == role.point

    chosen = [run for run in runs if any(map(is_shown, run.roles.values()))]
    return _read(chosen or [run for run in runs if runs[0].uses[0] in run.roles])


def _as_many_threads(repeated: Run, runs: Sequence[Run]) -> list[str]:
    """A note on a repeated run that had as many threads as the one that it repeats, and so measures no rounding."""
    threads = repeated.environment.get("threads")
    same = [run for run in runs if run is not repeated and run.config["seed"] == repeated.config["seed"]]
    if threads is None or all(run.environment.get("threads") != threads for run in same):
        return []
    return [f"rounding not measured: {repeated.folder} has {threads} threads, as the run that it repeats"]


def _read(runs: Sequence[StudyRun]) -> tuple[list[Run], list[str]]:
    """Finished runs, oldest first, and notes on those that are not finished."""
    started = [(read_run(state.folder), state.finished) for state in progress_of(runs) if state.folder is not None]
    finished = sorted((run for run, done in started if done), key=lambda run: run.folder.name)
    return finished, [unfinished(run) for run, done in started if not done]


def compare_arms(
    study: Study, runs: Sequence[StudyRun], strict: bool = True, command: str | None = None
) -> list[Comparison]:
    """Every comparison of a study; one that cannot be made has its reason.

    Args:
        study: the plan.
        runs: its runs.
        strict: whether another order of the data between the arms is refused.
        command: what trains the runs, for messages.
    """
    read = cache(read_run)
    states = [(run, state) for run, state in zip(runs, progress_of(runs), strict=True) if state.folder is not None]

    def arms_of(name: str, plan: Plan) -> Arms:
        found: dict[str, list[Run]] = {arm: [] for arm in plan.parsed}
        notes = []
        for run, state in states:
            if name in run.roles and state.folder is not None:
                content = read(state.folder)
                if state.finished:
                    found[run.roles[name].arm.name].append(content)
                else:
                    notes.append(unfinished(content))
                if run.repeats and state.finished:
                    notes += _as_many_threads(content, found[run.roles[name].arm.name])
        return pair_arms(plan, found, notes, _root(runs[0]), strict, command)

    return [make_comparison(name, plan, partial(arms_of, name, plan)) for name, plan in study.plans().items()]

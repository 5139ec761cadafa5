"""Search for the runs of two arms, paired by seed; what cannot be compared is refused, what is left out is named."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_lm.comparison.comparability import (
    CHANGES,
    ENVIRONMENT,
    ORDER,
    SEED,
    IncomparableError,
    MissingRunsError,
    config_values,
    differences,
    environment_value,
    following,
    precisions,
    revision_note,
)
from t2i_lm.comparison.plan import Plan, setting_words
from t2i_lm.config.sections import RunConfig
from t2i_lm.config.values import Plain, read_value, value_word
from t2i_lm.storage.reading import reason
from t2i_lm.storage.run_folder import Run, folders_below, in_order, read_run

PRECISIONS = "precision by seed"  # likewise
MOST_SHOWN = 3  # values of a key that a message names; of more keys, it names the command of several plans, too


@dataclass(frozen=True)
class Arms:
    """The finished runs of two arms by seed, of one setting.

    Attributes:
        first, second: by seed, the runs of an arm; several of a seed are equal but for rounding.
        notes: what was left out, and what the reader should know.
    """

    first: Mapping[int, Sequence[Run]]
    second: Mapping[int, Sequence[Run]]
    notes: tuple[str, ...]

    @property
    def seeds(self) -> list[int]:
        """Seeds of which both arms have a run."""
        return sorted(self.first.keys() & self.second.keys())

    @property
    def runs(self) -> list[Run]:
        """Every run."""
        return [run for arm in (self.first, self.second) for runs in arm.values() for run in runs]


def find_arms(plan: Plan, root: Path, strict: bool = True) -> Arms:
    """The finished runs of a plan's arms below `root`, those of sweeps in it included; as `pair_arms`."""
    notes: list[str] = []
    found = {arm: _finished(plan, root, arm, notes) for arm in plan.parsed}
    return pair_arms(plan, found, notes, root, strict)


def pair_arms(
    plan: Plan,
    found: Mapping[str, Sequence[Run]],
    notes: Sequence[str],
    root: Path,
    strict: bool = True,
    command: str | None = None,
) -> Arms:
    """Finished runs paired by seed.

    Args:
        plan: what is compared.
        found: the runs of each arm.
        notes: on runs that were left out.
        root: folder of the runs, for messages.
        strict: whether another order of the data between the arms is refused; else it is a note.
        command: what makes the runs, for messages; None for a sweep below `root`.

    Raises:
        IncomparableError: if the runs are of more than one setting, naming the keys and how to choose.
        MissingRunsError: if no seed has a run of both arms.
    """
    everything = [run for runs in found.values() for run in runs]
    # The arms start from other weights by design, and have keys of their own; the runs of one arm do not.
    _require_one_setting(everything, (SEED, ORDER, *plan.varied, ENVIRONMENT["backbone"]), plan.own_keys)
    for arm, runs in found.items():
        _require_one_setting(runs, (SEED, ORDER), arm=arm, own_value=plan.varied)
    first, second = (_by_seed(found[arm]) for arm in plan.parsed)
    arms = Arms(first, second, ())
    if not arms.seeds:
        raise MissingRunsError(_nothing_to_pair(plan, root, found, notes, command))
    return Arms(
        first,
        second,
        (
            *notes,
            *_absent(plan, first, second),
            *_by_design(plan, arms),
            *([] if ORDER in following(plan.own_keys) else _order(arms, strict)),
            *precision_note(arms.runs),
            *revision_note(arms.runs),
        ),
    )


def _finished(plan: Plan, root: Path, arm: str, notes: list[str]) -> list[Run]:
    """Finished runs of an arm that meet the plan, oldest first; adds a note for every other run of it."""
    return finished_runs(
        root, plan.parsed[arm].experiment, notes, lambda run: meets(plan, arm, run, config_values(run))
    )


def finished_runs(
    root: Path, experiment: str, notes: list[str], wanted: Callable[[Run], bool] = lambda _: True
) -> list[Run]:
    """Finished runs of an experiment below a folder, oldest first.

    Args:
        root: the folder.
        experiment: its name.
        notes: a line is added for every run that is unreadable, or wanted and unfinished.
        wanted: which runs to return.
    """
    runs = []
    for folder in in_order(folders_below(root, experiment)):
        try:
            run = read_run(folder)
            config_values(run)
        except (ValueError, OSError) as error:
            notes.append(f"left out, unreadable: {folder}: {reason(error)}")
            continue
        if wanted(run):
            if run.report is None:
                notes.append(unfinished(run))
            else:
                runs.append(run)
    return runs


def meets(plan: Plan, arm: str, run: Run, values: Mapping[str, Any]) -> bool:
    """Whether a run has the scale, a seed and the values of an arm of a plan.

    Args:
        plan: what is compared.
        arm: name of the arm.
        run: the run.
        values: its `config_values`.

    Raises:
        ValueError: if `where` names neither a config key nor an entry of env.json.
    """
    chosen = all(_has(run, values, *item) for item in plan.required(arm).items())
    return bool(values["scale"] == plan.scale and chosen and (not plan.seeds or values[SEED] in plan.seeds))


def unfinished(run: Run) -> str:
    """The note on a run without a report."""
    step = run.metrics[-1]["step"] if run.metrics else 0
    total = config_values(run)["trainer.max_steps"]
    return f"left out, unfinished at step {step:,} of {total:,}: {run.folder}"


def _has(run: Run, values: Mapping[str, Any], key: str, expected: Any) -> bool:
    """Whether a run has a value of a config key, or of an entry of env.json (a hash also by its beginning)."""
    if key in ENVIRONMENT:
        return str(environment_value(run, key)).startswith(str(expected))
    if key not in values:
        raise ValueError(f"where {key}={expected}: expected a config key or one of {', '.join(ENVIRONMENT)}")
    # YAML takes 3e-3 for text: as in an experiment, the type of the key decides.
    return bool(values[key] == read_value(key, Plain(expected) if isinstance(expected, str) else expected))


def _by_seed(runs: Sequence[Run]) -> dict[int, list[Run]]:
    result: dict[int, list[Run]] = {}
    for run in runs:
        result.setdefault(int(config_values(run)[SEED]), []).append(run)
    return result


def _require_one_setting(
    runs: Sequence[Run],
    varied: tuple[str, ...],
    own: Collection[str] = (),
    arm: str | None = None,
    own_value: Sequence[str] = (),
) -> None:
    """Checks that runs are of one setting.

    Args:
        runs: of one arm, or of all.
        varied: keys in which they may differ.
        own: keys of which arms have values of their own.
        arm: the one arm.
        own_value: keys, or their beginnings, that are chosen for an arm alone, since the arms differ in them.
    """
    if differing := differences(runs, varied, own, arm is not None, paired=True):
        names = {name: path for path, name in ENVIRONMENT.items()}
        words, choices = [], []
        for key, values in differing.items():
            counts = Counter(map(str, values))
            shown = [f"{_short(value)} ({count} runs)" for value, count in counts.most_common(MOST_SHOWN)]
            more = [f"and {len(counts) - MOST_SHOWN} more"] if len(counts) > MOST_SHOWN else []
            words.append(f"{key}: {', '.join([*shown, *more])}")
            if key == CHANGES:  # nothing to choose by
                continue
            common = counts.most_common(1)[0][0]
            word = value_word(next(value for value in values if str(value) == common))
            alone = arm is not None and key.startswith(tuple(own_value))
            choices.append(
                f"arms: {{{arm}: {{{key}: {word}}}}} in a plan"
                if alone
                else shlex.quote(f"{names.get(key, key)}={word}")
            )
        advice = f"Choose one, for example {' '.join(choices)}" if choices else "Train the changed runs again"
        if len(words) > MOST_SHOWN:
            advice += "; runs of several plans are compared by `python -m t2i_lm.study PLAN --results FOLDER`"
        raise IncomparableError(f"the runs are of more than one setting: {'; '.join(words)}. {advice}")


def _short(value: str) -> str:
    """A value with the beginnings of hashes."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1...", value)


def _absent(plan: Plan, first: Mapping[int, Any], second: Mapping[int, Any]) -> list[str]:
    """A line for every seed that an arm lacks."""
    return [
        f"MISSING: seed {seed} of {arm}"
        for seed in sorted({*plan.seeds, *first, *second})
        for arm, runs in zip(plan.parsed, (first, second), strict=True)
        if seed not in runs
    ]


def _by_design(plan: Plan, arms: Arms) -> list[str]:
    """A line for every other entry in which the arms differ because of keys of their own."""
    one, two = (next(iter(arm.values()))[0] for arm in (arms.first, arms.second))
    differing = differences([one, two])
    entries = sorted(following(plan.own_keys) & differing.keys())
    return [
        f"by design: {entry}: "
        + ", ".join(f"{arm} {str(value)[:40]}" for arm, value in zip(plan.parsed, differing[entry], strict=True))
        for entry in entries
        if entry != ORDER
    ]


def _order(arms: Arms, strict: bool) -> list[str]:
    """Notes on seeds whose arms saw the data in another order.

    Raises:
        IncomparableError: if there is one, and `strict`.
    """
    other = [seed for seed in arms.seeds if ORDER in differences([*arms.first[seed], *arms.second[seed]])]
    if other and strict:
        raise IncomparableError(f"seed {', '.join(map(str, other))}: the arms saw the data in another order")
    return [f"NOT CONTROLLED: seed {seed}: the arms saw the data in another order" for seed in other]


def precision_note(runs: Iterable[Run]) -> list[str]:
    """A note on seeds of several precisions, each of which has one."""
    seeds: dict[str, list[int]] = {}
    for seed, (name, *others) in sorted(precisions(runs).items()):
        if others:  # varied by the plan
            return []
        seeds.setdefault(name, []).append(seed)
    words = (f"{name} for seed{'s' * (len(own) > 1)} {', '.join(map(str, own))}" for name, own in seeds.items())
    return [f"{PRECISIONS}: {', '.join(words)}"] if len(seeds) > 1 else []


def _nothing_to_pair(
    plan: Plan, root: Path, found: Mapping[str, Sequence[Run]], notes: Sequence[str], command: str | None
) -> str:
    counts = ", ".join(f"{len(runs)} of {arm}" for arm, runs in found.items())
    lines = [
        f"no seed has a finished run of both arms in {root} (scale {plan.scale}{plan.values_words}): {counts}",
        *notes,
        *(f"to make them: {one}" for one in ([command] if command else _sweeps(plan, root))),
    ]
    return "\n".join(lines)


def _sweeps(plan: Plan, root: Path) -> list[str]:
    """The commands that train the runs of a plan below a folder: one for each setting of its arms."""
    seeds = ",".join(map(str, plan.seeds or (0, 1, 2)))
    settings: dict[tuple[str, ...], list[str]] = {}
    for name, arm in plan.parsed.items():
        words = setting_words({key: value for key, value in plan.required(name).items() if key not in ENVIRONMENT})
        settings.setdefault(tuple(words), []).extend(("--arm", re.sub("^remedy_", "remedies/", arm.experiment)))
    place = [] if root == Path(RunConfig().dir) else [f"run.dir={root}"]
    return [
        shlex.join(["python", "-m", "t2i_lm.sweep", f"seed={seeds}", *words, *place, *options, "--scale", plan.scale])
        for words, options in settings.items()
    ]

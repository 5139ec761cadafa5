"""Gap of two arms against training tokens: every length a run of its own, paired by seed, with fits of its decay."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from t2i_lm.comparison.arms import finished_runs, pair_arms
from t2i_lm.comparison.comparability import (
    ARM_KEYS,
    ENVIRONMENT,
    HASHED,
    ORDER,
    PRECISION,
    SEED,
    MissingRunsError,
    config_values,
    environment_value,
)
from t2i_lm.comparison.comparison import Comparison, make_comparison
from t2i_lm.comparison.decay import Decay, decay_sentences, fit_decay
from t2i_lm.comparison.endpoints import Endpoint
from t2i_lm.comparison.grid import require_one_version
from t2i_lm.comparison.plan import Plan
from t2i_lm.comparison.statistics import PairedStatistics
from t2i_lm.comparison.study_plan import IN_STEPS, LENGTHS, STEPS, Family, curve_plans
from t2i_lm.comparison.tables import interval_text, value_text
from t2i_lm.config.key_groups import is_neutral
from t2i_lm.runtime.tables import compact, text_table
from t2i_lm.storage.run_folder import Run


@dataclass(frozen=True)
class Length:
    """The difference of the arms' primary endpoint after a number of tokens.

    Attributes:
        steps, tokens: of each run, pads included.
        differences: first arm minus second, by seed.
        statistics: of them.
        second: mean of the second arm.
        saved: mean of `tokens_saved`, where the plan has that endpoint.
        comparison: with its runs.
    """

    steps: int
    tokens: float
    differences: Mapping[int, float]
    statistics: PairedStatistics
    second: float
    saved: float | None
    comparison: Comparison


@dataclass(frozen=True)
class GapCurve:
    """The gap of two arms by tokens.

    Attributes:
        name: of its files.
        plan: that of one length.
        lengths: shortest first.
        decay: fits over them.
        notes: lengths that are left out, and why.
        family: the comparison of the study; empty without a study.
    """

    name: str
    plan: Plan
    lengths: tuple[Length, ...]
    decay: Decay
    notes: tuple[str, ...]
    family: str = ""

    @property
    def runs(self) -> dict[str, Run]:
        """Every run by arm, steps and seed."""
        found: dict[str, Run] = {}
        for length in self.lengths:
            assert length.comparison.arms is not None
            both = (length.comparison.arms.first, length.comparison.arms.second)
            for arm, by_seed in zip(length.comparison.plan.parsed, both, strict=True):
                found |= {f"{arm} {length.steps:,} steps seed {seed}": runs[-1] for seed, runs in by_seed.items()}
        return found


def gap_curves(families: Sequence[Family], comparisons: Sequence[Comparison]) -> tuple[list[GapCurve], list[str]]:
    """The curves of `curve_plans`, and why others cannot be made."""
    by_name = {one.name: one for one in comparisons}
    curves, problems = [], []
    for plan in curve_plans(families):
        try:
            curve = gap_curve(plan.name, [by_name[name] for name in plan.members])
            curves.append(replace(curve, family=plan.family))
        except ValueError as error:
            problems.append(f"{plan.name}: gap against training tokens: {error}")
    return curves, problems


def gap_curve(name: str, comparisons: Sequence[Comparison]) -> GapCurve:
    """The curve of comparisons that differ in length.

    A length without every seed of its plan is left out, and named.

    Raises:
        IncomparableError: if the runs of an arm differ in more than their length.
        ValueError: if the primary endpoint is of pairs of runs.
    """
    require_one_version(comparisons, (STEPS,))
    primary = Endpoint(comparisons[0].plan.primary)
    if primary.of_pair:
        raise ValueError(f"primary={primary.name}: expected an endpoint of single runs, such as val/iid.image.nll")
    lengths, notes = [], []
    for one in comparisons:
        if one.arms is None:
            notes.append(f"left out, {one.name}: {str(one.problem).splitlines()[0]}")
            continue
        result = one.results[0]
        if result.missing:
            absent = sorted({*one.plan.seeds} - {*one.arms.seeds})
            notes.append(f"left out, {one.name}: MISSING seeds {', '.join(map(str, absent))}")
            continue
        run = one.arms.runs[0]
        assert result.means is not None
        saved = [other.statistics.mean for other in one.results if other.endpoint.of_pair]
        lengths.append(
            Length(
                steps=int(run.metrics[-1]["step"]),
                tokens=float(run.metrics[-1]["tokens_nominal"]),
                differences=result.differences,
                statistics=result.statistics,
                second=result.means[1],
                saved=saved[0] if saved else None,
                comparison=one,
            )
        )
        notes += [f"{one.name}: {note}" for note in one.arms.notes]
    lengths.sort(key=lambda length: length.tokens)
    plan = lengths[0].comparison.plan if lengths else comparisons[0].plan
    points: dict[float, dict[int, float]] = {}
    for length in lengths:  # seeds of one length may be of several comparisons
        points.setdefault(length.tokens, {}).update(length.differences)
    return GapCurve(name, plan, tuple(lengths), fit_decay(points, plan.alpha), tuple(dict.fromkeys(notes)))


def find_gap_curve(root: Path, scale: str | None = None) -> GapCurve:
    """The gap of the default plan's arms from all finished runs below a folder, without a plan of the lengths.

    Of several settings, the one with the most lengths is used, of those the one with the most seeds, of those the
    newest; the number of the other runs is in the notes.

    Raises:
        ValueError: if no setting has enough lengths.
    """
    plan, notes = Plan(secondary=["tokens_saved.image"]), list[str]()
    settings: dict[str, dict[int, dict[str, list[Run]]]] = {}
    for name, arm in plan.parsed.items():
        for run in finished_runs(root, arm.experiment, notes):
            values = config_values(run)
            if scale in (None, values["scale"]):
                by_length = settings.setdefault(_setting(run, values), {})
                by_length.setdefault(values[STEPS], {}).setdefault(name, []).append(run)
    complete = [
        {steps: arms for steps, arms in sorted(one.items()) if len(arms) == len(plan.parsed)}
        for one in settings.values()
    ]
    best = max(complete, key=_standing, default={})
    if len(best) < LENGTHS:
        raise MissingRunsError(
            f"gap: no setting of {' and '.join(plan.parsed)} in {root} has finished runs of {LENGTHS} lengths; to make "
            "them: python -m t2i_lm.study experiments/plans/data_budget.yaml"
        )
    others = sum(len(runs) for one in complete if one is not best for arms in one.values() for runs in arms.values())
    comparisons = []
    for steps, arms in best.items():
        own = replace(plan, scale=str(config_values(next(iter(arms.values()))[0])["scale"]), where={STEPS: steps})
        comparisons.append(make_comparison(f"{steps} steps", own, partial(pair_arms, own, arms, (), root)))
    curve = gap_curve("gap", comparisons)
    if len(curve.lengths) < LENGTHS:
        raise MissingRunsError(
            f"gap: {len(curve.lengths)} lengths have results, {LENGTHS} required; {'; '.join(curve.notes)}"
        )
    left = [f"left out, of other settings: {others} runs"] if others else []
    return replace(curve, notes=(*curve.notes, *left, *notes))


def _standing(lengths: Mapping[int, Mapping[str, Sequence[Run]]]) -> tuple[int, int, str]:
    """Lengths of a setting, pairs of runs, and its newest run's folder: by which one is chosen."""
    seeds = [[{config_values(run)[SEED] for run in runs} for runs in arms.values()] for arms in lengths.values()]
    pairs = sum(len(set.intersection(*arms)) for arms in seeds)
    names = [run.folder.name for arms in lengths.values() for runs in arms.values() for run in runs]
    return len(lengths), pairs, max(names, default="")


def _setting(run: Run, values: Mapping[str, Any]) -> str:
    """Everything in which runs of a curve agree, whatever their arm, seed and length."""
    free = (*ARM_KEYS, SEED, STEPS, *IN_STEPS, *HASHED)
    config = {key: value for key, value in values.items() if key not in free and not is_neutral(key)}
    config["share of warm-up"] = round(values["optim.warmup_steps"] / values[STEPS], 2)
    shared = [path for path, name in ENVIRONMENT.items() if name not in (ORDER, PRECISION, ENVIRONMENT["backbone"])]
    return repr((sorted(config.items(), key=str), [environment_value(run, path) for path in shared]))


def gap_text(curve: GapCurve) -> str:
    """A row per length, then the fits and what is left out."""
    first, second = curve.plan.parsed
    header = (
        "tokens",
        "steps",
        f"{first} - {second}",
        f"{100 * (1 - curve.plan.alpha):g} % t-interval",
        "n",
        f"% of {second}",
        "tokens saved",
    )
    rows = []
    for one in curve.lengths:
        result = one.comparison.results[0]
        rows.append(
            (
                compact(int(one.tokens)),
                f"{one.steps:,}",
                value_text(result, one.statistics.mean, signed=True),
                interval_text(result, one.statistics.t_interval),
                str(one.statistics.n),
                f"{100 * one.statistics.mean / one.second:+z.2f}",
                "" if one.saved is None else compact(int(one.saved)),
            )
        )
    title = f"{curve.name}: gap of {curve.plan.primary} against training tokens, each length a run of its own"
    return "\n".join(
        [title, "", text_table(header, rows), "", *decay_sentences(curve.decay, curve.plan.alpha), *curve.notes]
    )


def gap_json(curve: GapCurve) -> str:
    """The same as JSON, with the differences by seed and the run folders."""
    content: dict[str, Any] = {
        "name": curve.name,
        "plan": asdict(curve.plan),
        "lengths": [
            {
                "steps": one.steps,
                "tokens": one.tokens,
                "differences": one.differences,
                **asdict(one.statistics),
                "second": one.second,
                "tokens_saved": one.saved,
            }
            for one in curve.lengths
        ],
        "fits": {kind: asdict(fit) for kind, fit in curve.decay.fits.items()},
        "chosen": curve.decay.chosen,
        "sentences": decay_sentences(curve.decay, curve.plan.alpha),
        "notes": curve.notes,
        "data_hash": next((run.environment.get("data_hash") for run in curve.runs.values()), None),
        "runs": sorted(str(run.folder) for run in curve.runs.values()),
    }
    return json.dumps(content, indent=2)

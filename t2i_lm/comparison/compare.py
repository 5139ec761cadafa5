"""Comparison of two arms: every endpoint of a plan with its statistics and verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance

from t2i_lm.comparison.arms import Arms
from t2i_lm.comparison.comparability import IncomparableError
from t2i_lm.comparison.endpoints import Endpoint
from t2i_lm.comparison.measurement import require_one_measurement, require_one_tokenizer
from t2i_lm.comparison.plan import Margin, Plan
from t2i_lm.comparison.statistics import (
    PairedStatistics,
    holm,
    paired_statistics,
    pairs_for_difference,
    pairs_for_equivalence,
)
from t2i_lm.storage.run_folder import Run

DIFFERENCE, EQUIVALENT, SMALL, UNDECIDED = (
    "difference",
    "equivalent",
    "difference below the margin",
    "undecided",
)


@dataclass(frozen=True)
class Result:
    """One endpoint of a comparison.

    Attributes:
        endpoint: what was compared.
        primary: whether its verdict is uncorrected.
        means: of both arms; None for an endpoint of pairs.
        differences: first arm minus second, by seed.
        margin: largest difference that counts as none, in the endpoint's unit; None without one.
        statistics: of the differences; p-values are corrected for the number of secondary endpoints.
        rounding_sd: standard deviation between runs that are equal but for rounding (another number of threads);
            None without such runs.
        needed_difference: pairs for 80 % power to find a true difference of the size of the mean.
        needed_equivalence: pairs for 80 % power to show equivalence if there is no difference.
        missing: seeds of the plan of which an arm has no run; with any, the verdict is UNDECIDED.
        verdict: DIFFERENCE, EQUIVALENT, SMALL (both) or UNDECIDED.
    """

    endpoint: Endpoint
    primary: bool
    means: tuple[float, float] | None
    differences: Mapping[int, float]
    margin: float | None
    statistics: PairedStatistics
    rounding_sd: float | None
    needed_difference: int | None
    needed_equivalence: int | None
    missing: int
    verdict: str


def compare(plan: Plan, arms: Arms) -> list[Result]:
    """The results of a plan's endpoints, the primary one first.

    Raises:
        ValueError: if a run lacks an endpoint, naming what it has; if they were not measured alike.
    """
    return _decided(plan, [_result(plan, arms, endpoint, not number) for number, endpoint in enumerate(plan.endpoints)])


def compare_measured(plan: Plan, arms: Arms) -> tuple[Plan, Arms, list[Result]]:
    """As `compare`, without the secondary endpoints that a run lacks, or that were not measured alike.

    Returns:
        The plan without them, the arms with a note on each, and the results.

    Raises:
        ValueError: of the primary endpoint.
    """
    primary, *others = plan.endpoints
    results, notes = [_result(plan, arms, primary, True)], []
    for endpoint in others:
        try:
            results.append(_result(plan, arms, endpoint, False))
        except IncomparableError as error:
            notes.append(f"REFUSED: {error}")
        except ValueError as error:
            notes.append(f"MISSING: {error}")
    kept = replace(plan, secondary=[one.endpoint.name for one in results[1:]])
    return kept, replace(arms, notes=(*arms.notes, *notes)), _decided(plan, results)


def _decided(plan: Plan, results: Sequence[Result]) -> list[Result]:
    """Results with corrected p-values and their verdicts."""
    corrected = [results[0], *_corrected(results[1:])]
    # A look at a part of the planned seeds is no test at level alpha.
    return [one if one.missing else replace(one, verdict=_verdict(one.statistics, plan.alpha)) for one in corrected]


def _result(plan: Plan, arms: Arms, endpoint: Endpoint, primary: bool) -> Result:
    first, second = ({seed: arm[seed] for seed in arms.seeds} for arm in (arms.first, arms.second))
    runs = [run for arm in (first, second) for runs in arm.values() for run in runs]
    require_one_tokenizer(endpoint, runs)
    require_one_measurement(endpoint, runs, (*plan.varied, *plan.own_keys))
    means = None
    margin = None
    if endpoint.of_pair:
        differences = {
            seed: fmean(endpoint.difference(one, two) for one in first[seed] for two in second[seed])
            for seed in arms.seeds
        }
    else:
        values = [{seed: fmean(map(endpoint.value, runs)) for seed, runs in arm.items()} for arm in (first, second)]
        differences = {seed: values[0][seed] - values[1][seed] for seed in arms.seeds}
        means = fmean(values[0].values()), fmean(values[1].values())
        parsed = Margin.parse(plan.margin)
        if primary or parsed.relative:  # an absolute margin is in the primary endpoint's unit
            margin = parsed.absolute(means[1])
    statistics = paired_statistics(list(differences.values()), margin, plan.alpha)
    sd = statistics.sd if statistics.t_interval else None
    return Result(
        endpoint=endpoint,
        primary=primary,
        means=means,
        differences=differences,
        margin=margin,
        statistics=statistics,
        rounding_sd=None if endpoint.of_pair else _rounding_sd(endpoint, [*first.values(), *second.values()]),
        needed_difference=None if sd is None else pairs_for_difference(statistics.mean, sd, plan.alpha),
        needed_equivalence=None if sd is None or margin is None else pairs_for_equivalence(margin, sd, plan.alpha),
        missing=len({*plan.seeds} - {*arms.seeds}),
        verdict=UNDECIDED,
    )


def _rounding_sd(endpoint: Endpoint, repeated: Sequence[Sequence[Run]]) -> float | None:
    """Pooled standard deviation of an endpoint between runs of an arm and seed with other numbers of threads."""
    squares, degrees = 0.0, 0
    for runs in repeated:
        by_threads = {run.environment.get("threads"): endpoint.value(run) for run in runs}
        if len(by_threads) > 1:
            squares += variance(by_threads.values()) * (len(by_threads) - 1)
            degrees += len(by_threads) - 1
    return math.sqrt(squares / degrees) if degrees else None


def _corrected(results: Sequence[Result]) -> list[Result]:
    """Secondary results with p-values corrected for the number of tests of each kind."""
    different = holm([one.statistics.p_difference for one in results])
    equivalent = holm([one.statistics.p_equivalence for one in results])
    return [
        replace(one, statistics=replace(one.statistics, p_difference=difference, p_equivalence=equivalence))
        for one, difference, equivalence in zip(results, different, equivalent, strict=True)
    ]


def _verdict(statistics: PairedStatistics, alpha: float) -> str:
    different = statistics.p_difference is not None and statistics.p_difference < alpha
    equivalent = statistics.p_equivalence is not None and statistics.p_equivalence < alpha
    if different and equivalent:
        return SMALL
    return DIFFERENCE if different else EQUIVALENT if equivalent else UNDECIDED

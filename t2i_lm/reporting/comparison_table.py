"""Results of a comparison as rows of the page, with the place of each interval on a common axis."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from t2i_lm.comparison.compare import Result
from t2i_lm.comparison.comparison import Comparison
from t2i_lm.comparison.tables import interval_text, p_text, sentence, setting, value_text
from t2i_lm.reporting.findings import arm_label, endpoint_label

ROOM = 1.12  # of the axis beyond the largest value


@dataclass(frozen=True)
class Bar:
    """Places on an axis from 0 to 100 with no difference at 50: interval, margin, and one point per seed."""

    low: float | None
    high: float | None
    margin: float | None
    points: tuple[float, ...]
    mean: float


@dataclass(frozen=True)
class Row:
    """A result as cells."""

    endpoint: str
    name: str
    unit: str
    primary: bool
    first: str
    second: str
    difference: str
    interval: str
    n: str
    p: str
    margin: str
    p_equivalence: str
    verdict: str
    bar: Bar


@dataclass(frozen=True)
class ComparisonTable:
    """Headings and rows of a comparison; `more`: bootstrap interval and rounding of the primary endpoint, in words."""

    name: str
    first: str
    second: str
    level: str
    setting: str
    rows: tuple[Row, ...]
    more: tuple[str, ...]


def comparison_table(comparison: Comparison) -> ComparisonTable:
    """The table of a comparison that has results."""
    plan, arms = comparison.plan, comparison.arms
    assert arms is not None
    first, second = map(arm_label, plan.parsed)
    of_loss = _limit([one for one in comparison.results if one.endpoint.unit == "nats/token"])
    rows = []
    for one in comparison.results:
        statistics = one.statistics
        means = ("", "") if one.means is None else [value_text(one, mean) for mean in one.means]
        limit = of_loss if one.endpoint.unit == "nats/token" else _limit([one])
        rows.append(
            Row(
                endpoint=endpoint_label(one.endpoint.name),
                name=one.endpoint.name,
                unit=one.endpoint.unit,
                primary=one.primary,
                first=means[0],
                second=means[1],
                difference=value_text(one, statistics.mean, signed=True),
                interval=interval_text(one, statistics.t_interval) or "none",
                n=str(statistics.n),
                p=p_text(statistics.p_difference),
                margin="" if one.margin is None else value_text(one, one.margin),
                p_equivalence=p_text(statistics.p_equivalence),
                verdict=sentence(plan, one, arm_label),
                bar=_bar(one, limit),
            )
        )
    words = f"{comparison.name}: {first} minus {second}, paired by seed: {setting(plan, arms)}"
    level = f"{100 * (1 - plan.alpha):g} %"
    return ComparisonTable(comparison.name, first, second, level, words, tuple(rows), tuple(_more(comparison)))


def _more(comparison: Comparison) -> Iterator[str]:
    """The primary endpoint's bootstrap interval, and its deviation between runs that are equal but for rounding."""
    first = comparison.results[0]
    label, level = endpoint_label(first.endpoint.name), f"{100 * (1 - comparison.plan.alpha):g} %"
    if first.statistics.bootstrap_interval is not None:
        yield f"{level} bootstrap interval, {label}: {interval_text(first, first.statistics.bootstrap_interval)}."
    if first.rounding_sd is not None:
        deviation = value_text(first, first.rounding_sd)
        yield f"Standard deviation of runs that are equal but for rounding, {label}: {deviation}."


def _limit(results: Sequence[Result]) -> float:
    values = [0.0]
    for one in results:
        values += [*one.differences.values(), one.margin or 0.0, *(one.statistics.t_interval or ())]
    return ROOM * max(map(abs, values)) or 1.0


def _bar(result: Result, limit: float) -> Bar:
    def place(value: float) -> float:
        return round(50 + 50 * value / limit, 2)

    low, high = result.statistics.t_interval or (None, None)
    return Bar(
        low=None if low is None else place(low),
        high=None if high is None else place(high),
        margin=None if result.margin is None else round(50 * result.margin / limit, 2),
        points=tuple(map(place, result.differences.values())),
        mean=place(result.statistics.mean),
    )

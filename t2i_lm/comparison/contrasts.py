"""Contrasts: how the difference of two arms changes over a grid, such as with and without positions."""

from collections.abc import Mapping
from statistics import fmean

from t2i_lm.comparison.comparison import Comparison
from t2i_lm.comparison.grid import Grid, labeled_points
from t2i_lm.comparison.plan import Margin
from t2i_lm.comparison.statistics import PairedStatistics, holm, paired_statistics
from t2i_lm.comparison.study_plan import STEPS
from t2i_lm.comparison.tables import interval_text, p_text, value_text

PERCENT = "percent"


def contrasts(grid: Grid) -> list[str]:
    """How the difference changes over a grid of one key that is not tuned: each point minus the first, by seed.

    Of the primary endpoint, with a relative margin also in percent of the second arm, and of the planned tokens saved.
    P-values are corrected for their number (Holm).
    """
    if len(grid.family.keys) != 1 or grid.tuned is not None or STEPS in grid.family.keys:
        return []
    found: list[tuple[str, Comparison, str, PairedStatistics]] = []
    firsts: dict[str, tuple[str, Comparison]] = {}
    for labels, one, _ in labeled_points(grid):
        arm = next(iter(one.plan.parsed))
        if one.arms is None or one.results[0].missing:
            continue
        name, first = firsts.setdefault(arm, (labels[-1], one))
        if first is one:
            continue
        prefix = f"{arm}: " if "arm" in grid.labels else ""
        before, after = _differences(first), _differences(one)
        for measure in (each for each in after if each in before):
            mine, other = after[measure], before[measure]
            if shared := sorted(mine.keys() & other.keys()):
                statistics = paired_statistics([mine[seed] - other[seed] for seed in shared], alpha=one.plan.alpha)
                what = "difference" if measure in (one.plan.primary, PERCENT) else measure
                found.append((f"{prefix}{what} at {labels[-1]} minus that at {name}", one, measure, statistics))
    p_values = holm([statistics.p_difference for *_, statistics in found])
    several = " (Holm)" * (len(p_values) - p_values.count(None) > 1)
    lines = []
    for (words, one, measure, statistics), p in zip(found, p_values, strict=True):
        if measure == PERCENT:
            unit = f" percentage points of {[*one.plan.parsed][1]}"
            value, interval = f"{statistics.mean:+.2f}", statistics.t_interval
            span = "no interval" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
        else:
            result = next(each for each in one.results if each.endpoint.name == measure)
            unit, value = "", value_text(result, statistics.mean, signed=True)
            span = interval_text(result, statistics.t_interval) or "no interval"
        lines.append(
            f"{words}: {value}{unit}, {100 * (1 - one.plan.alpha):g} % t-interval {span}, n = {statistics.n}, "
            f"p {p_text(p) or 'none'}{several if p is not None else ''}"
        )
    return lines


def _differences(one: Comparison) -> dict[str, Mapping[int, float]]:
    """Differences of each seed by measure: the primary endpoint, `PERCENT`, and endpoints of tokens saved."""
    assert one.arms is not None
    primary, second = one.results[0], one.arms.second
    found: dict[str, Mapping[int, float]] = {primary.endpoint.name: primary.differences}
    if Margin.parse(one.plan.margin).relative and primary.endpoint.is_loss:
        found[PERCENT] = {
            seed: 100 * difference / fmean(map(primary.endpoint.value, second[seed]))
            for seed, difference in primary.differences.items()
        }
    saved = (result for result in one.results[1:] if result.endpoint.of_pair)
    return found | {result.endpoint.name: result.differences for result in saved}

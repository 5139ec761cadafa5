"""Contrasts: how the difference of two arms changes over a grid, such as with and without positions."""

from statistics import fmean

from t2i_lm.comparison.comparison import Comparison
from t2i_lm.comparison.grid import Grid, labeled_points
from t2i_lm.comparison.plan import Margin
from t2i_lm.comparison.statistics import PairedStatistics, holm, paired_statistics
from t2i_lm.comparison.study_plan import STEPS
from t2i_lm.comparison.tables import interval_text, p_text, value_text


def contrasts(grid: Grid) -> list[str]:
    """How the difference changes over a grid of one key that is not tuned: each point minus the first, by seed.

    With a relative margin also in percent of the second arm. P-values are corrected for their number (Holm).
    """
    if len(grid.family.keys) != 1 or grid.tuned is not None or STEPS in grid.family.keys:
        return []
    found: list[tuple[str, Comparison, PairedStatistics, bool]] = []
    firsts: dict[str, tuple[str, Comparison]] = {}
    for labels, one, _ in labeled_points(grid):
        arm = next(iter(one.plan.parsed))
        if one.arms is None or one.results[0].missing:
            continue
        name, first = firsts.setdefault(arm, (labels[-1], one))
        if first is one:
            continue
        prefix = f"{arm}: " if "arm" in grid.labels else ""
        for percent in (False, True) if _in_percent(one) and _in_percent(first) else (False,):
            mine, other = ((_percents(each) if percent else each.results[0].differences) for each in (one, first))
            if shared := sorted(mine.keys() & other.keys()):
                statistics = paired_statistics([mine[seed] - other[seed] for seed in shared], alpha=one.plan.alpha)
                found.append((f"{prefix}difference at {labels[-1]} minus that at {name}", one, statistics, percent))
    p_values = holm([statistics.p_difference for _, _, statistics, _ in found])
    several = " (Holm)" * (len(p_values) - p_values.count(None) > 1)
    lines = []
    for (words, one, statistics, percent), p in zip(found, p_values, strict=True):
        if percent:
            unit = f" points of percent of {[*one.plan.parsed][1]}"
            value, interval = f"{statistics.mean:+.2f}", statistics.t_interval
            span = "no interval" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
        else:
            unit, value = "", value_text(one.results[0], statistics.mean, signed=True)
            span = interval_text(one.results[0], statistics.t_interval) or "no interval"
        lines.append(
            f"{words}: {value}{unit}, {100 * (1 - one.plan.alpha):g} % t-interval {span}, n = {statistics.n}, "
            f"p {p_text(p) or 'none'}{several if p is not None else ''}"
        )
    return lines


def _in_percent(one: Comparison) -> bool:
    """Whether its primary differences are also given in percent of the second arm: losses with a relative margin."""
    return Margin.parse(one.plan.margin).relative and one.results[0].endpoint.is_loss


def _percents(one: Comparison) -> dict[int, float]:
    """The primary difference of each seed in percent of the second arm's loss."""
    assert one.arms is not None
    endpoint, second = one.results[0].endpoint, one.arms.second
    return {
        seed: 100 * difference / fmean(map(endpoint.value, second[seed]))
        for seed, difference in one.results[0].differences.items()
    }

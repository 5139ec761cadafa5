"""Best value of a swept key by arm: whether it lies inside the grid, and how far the next value is behind."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from t2i_lm.comparison.statistics import PairedStatistics, paired_statistics

# Losses of an arm by value of the key and seed.
Losses = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Best:
    """The value of a key with an arm's lowest mean loss.

    Attributes:
        arm: its name.
        key: the swept key.
        value: the best value, as written.
        mean: of the loss at it, over `n` seeds.
        n: number of seeds.
        edge: `smallest` or `largest` where the best value bounds the grid, beyond which a better one may lie; else
            empty. Values that are no numbers have no order and no edge.
        interior: whether smaller and larger values were tried, and are worse.
        next: the next best value; None without another one.
        behind: its loss minus the best one's, paired by the seeds of both.
    """

    arm: str
    key: str
    value: str
    mean: float
    n: int
    edge: str
    interior: bool
    next: str | None
    behind: PairedStatistics | None

    @property
    def warning(self) -> str:
        """What an edge means; empty for an interior value."""
        if not self.edge:
            return ""
        return (
            f"EDGE OF THE GRID: {self.arm}'s best {self.key}, {self.value}, is the {self.edge}; a better one may follow"
        )

    @property
    def sentence(self) -> str:
        """Value, loss and n, whether it is interior, and the next best value with its interval."""
        where = (
            f"at the EDGE of the grid, its {self.edge} value"
            if self.edge
            else "interior to the grid"
            if self.interior
            else "of values without order"
        )
        words = f"{self.arm}: best {self.key} {self.value}, {where}; {self.mean:.4f} (n = {self.n})"
        if self.next is None or self.behind is None:
            return words
        words += f"; next {self.next}, {self.behind.mean:+.4f}"
        interval = self.behind.t_interval
        if interval is None:
            return f"{words}, no interval with n = {self.behind.n}"
        apart = "" if interval[0] > 0 else ", not told apart"
        return f"{words}, 95 % interval {interval[0]:+.4f} to {interval[1]:+.4f}, n = {self.behind.n}{apart}"


def best_value(arm: str, key: str, losses: Losses) -> Best:
    """The best value of an arm.

    Args:
        arm: its name.
        key: the swept key.
        losses: by value and seed, at least one.
    """
    means = {value: fmean(by_seed.values()) for value, by_seed in losses.items()}
    value, *others = sorted(means, key=means.__getitem__)
    numbers = _numbers(list(means))
    edge = ""
    if numbers is not None and len(numbers) > 1:
        edge = {min(numbers.values()): "smallest", max(numbers.values()): "largest"}.get(numbers[value], "")
    behind = None
    if others:
        shared = sorted(losses[value].keys() & losses[others[0]].keys())
        gaps = [losses[others[0]][seed] - losses[value][seed] for seed in shared]
        behind = paired_statistics(gaps) if gaps else None
    interior = numbers is not None and len(numbers) > 2 and not edge
    return Best(
        arm, key, value, means[value], len(losses[value]), edge, interior, others[0] if others else None, behind
    )


def common_value(by_arm: Mapping[str, Losses]) -> str | None:
    """The value with the lowest mean loss over all arms, each counted once; None if no value is of every arm."""
    first, *others = by_arm.values()
    shared = [value for value in first if all(value in losses for losses in others)]
    means = {value: fmean(fmean(losses[value].values()) for losses in by_arm.values()) for value in shared}
    return min(means, key=means.__getitem__) if means else None


def _numbers(values: list[str]) -> dict[str, float] | None:
    try:
        return {value: float(value) for value in values}
    except ValueError:  # words have no order
        return None

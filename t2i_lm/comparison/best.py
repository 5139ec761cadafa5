"""Best value of a swept key by arm: whether it lies inside the grid, and how far the next value is behind."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from t2i_lm.comparison.statistics import PairedStatistics, paired_statistics

# Losses of an arm by value of the key and seed.
Losses = Mapping[str, Mapping[int, float]]
Point = TypeVar("Point", bound=Hashable)


@dataclass(frozen=True)
class Best:
    """The value of a key with an arm's lowest mean loss.

    Attributes:
        arm: its name.
        key: the swept key.
        value: the best value, as written.
        mean: of the loss at it, over `n` seeds.
        n: number of seeds that all values have; others do not count.
        left_out: number of the other seeds.
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
    left_out: int
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
        others = f" seeds of all values, {self.left_out} others left out" if self.left_out else ""
        words = f"{self.arm}: best {self.key} {self.value}, {where}; {self.mean:.4f} (n = {self.n}{others})"
        if self.next is None or self.behind is None:
            return words
        words += f"; next {self.next}, {self.behind.mean:+.4f}"
        interval = self.behind.t_interval
        if interval is None:
            return f"{words}, no interval with n = {self.behind.n}"
        apart = "" if interval[0] > 0 else ", not told apart"
        return f"{words}, 95 % interval {interval[0]:+.4f} to {interval[1]:+.4f}, n = {self.behind.n}{apart}"


def shared_seeds(losses: Mapping[Point, Mapping[int, float]]) -> list[int]:
    """The seeds that all values have: a mean over other seeds is no better for a seed that is easier."""
    return sorted(set.intersection(*({*by_seed} for by_seed in losses.values()))) if losses else []


def seed_means(losses: Mapping[Point, Mapping[int, float]]) -> dict[Point, float]:
    """The mean loss of each value over the seeds that all of them have; empty if they share none."""
    seeds = shared_seeds(losses)
    return {value: fmean(by_seed[seed] for seed in seeds) for value, by_seed in losses.items()} if seeds else {}


def best_of(losses: Mapping[Point, Mapping[int, float]]) -> Point | None:
    """The value with the lowest mean loss over the seeds that all values have; None if they share none."""
    means = seed_means(losses)
    return min(means, key=means.__getitem__) if means else None


def no_best(arm: str, key: str) -> str:
    """Why an arm has no best value where `best_value` is None."""
    return f"{arm}: no best {key}, its values share no seed"


def best_value(arm: str, key: str, losses: Losses) -> Best | None:
    """The best value of an arm over the seeds that all values have; None if they share none.

    Args:
        arm: its name.
        key: the swept key.
        losses: by value and seed, at least one.
    """
    means, seeds = seed_means(losses), shared_seeds(losses)
    if not means:
        return None
    value, *others = sorted(means, key=means.__getitem__)
    numbers = _numbers(list(means))
    edge = ""
    if numbers is not None and len(numbers) > 1:
        edge = {min(numbers.values()): "smallest", max(numbers.values()): "largest"}.get(numbers[value], "")
    behind = None
    if others:
        behind = paired_statistics([losses[others[0]][seed] - losses[value][seed] for seed in seeds])
    interior = numbers is not None and len(numbers) > 2 and not edge
    left_out = len({seed for by_seed in losses.values() for seed in by_seed}) - len(seeds)
    after = others[0] if others else None
    return Best(arm, key, value, means[value], len(seeds), left_out, edge, interior, after, behind)


def common_value(by_arm: Mapping[str, Losses]) -> str | None:
    """The value with the lowest mean loss over all arms, each counted once and over the seeds that its values share.

    None if no value is of every arm, or an arm's values share no seed.
    """
    first, *others = by_arm.values()
    shared = [value for value in first if all(value in losses for losses in others)]
    of_arms = [seed_means({value: losses[value] for value in shared}) for losses in by_arm.values()]
    means = {value: fmean(one[value] for one in of_arms) for value in shared} if all(of_arms) else {}
    return min(means, key=means.__getitem__) if means else None


def _numbers(values: list[str]) -> dict[str, float] | None:
    try:
        return {value: float(value) for value in values}
    except ValueError:  # words have no order
        return None

"""Results of a comparison over its grid: each arm's best value, and the arms at their best."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from t2i_lm.comparison.arms import Arms, find_arms, finished_runs, meets, pair_arms
from t2i_lm.comparison.best import Best, best_value, common_value, no_best
from t2i_lm.comparison.comparability import ORDER, SEED, IncomparableError, config_values, differences
from t2i_lm.comparison.comparison import Comparison, make_comparison
from t2i_lm.comparison.endpoints import Endpoint
from t2i_lm.comparison.measurement import require_one_measurement
from t2i_lm.comparison.plan import Plan, require_settable, setting_words
from t2i_lm.comparison.statistics import holm
from t2i_lm.comparison.study_plan import IN_STEPS, STEPS, Family, Member
from t2i_lm.config.values import value_word
from t2i_lm.storage.run_folder import Run

# What to know of a comparison at best values.
OPTIMISTIC = "each arm's best value was chosen on the same seeds and validation data: the p-value at it is optimistic"


@dataclass(frozen=True)
class Grid:
    """A family of comparisons with its results, in the order of its members.

    Attributes:
        family: the comparisons.
        comparisons: with results.
        strict: whether another order of the data between the arms is refused.
        seeds: number of the plan's seeds, the first ones, over which best values are chosen; None for all. Verdicts are
            over all.
    """

    family: Family
    comparisons: tuple[Comparison, ...]
    strict: bool = True
    seeds: int | None = None

    @property
    def name(self) -> str:
        """That of the comparison in the study."""
        return self.family.name

    @property
    def labels(self) -> tuple[str, ...]:
        """Headings of what tells the points apart: the arm, where several are compared with the last, and the keys."""
        return (*(["arm"] if self.family.has_several_arms else []), *self.family.keys)

    @property
    def plan(self) -> Plan:
        """That of the first point with results; those of the others differ in the values of the keys alone."""
        with_results = (one.plan for one in self.comparisons if one.arms is not None)
        return next(with_results, self.family.members[0].plan)

    @property
    def tuned(self) -> str | None:
        """The key of which each arm has a best value; None without one, or for an endpoint that is no loss."""
        return self.family.tuned


@dataclass(frozen=True)
class Tuned:
    """The best values of a tuned key under one condition, the values of the grid's other keys.

    Attributes:
        condition: those values; empty without other keys.
        best: of each arm.
        common: the value that is best for all arms together; None without one.
        missing: why there is no best value: points without every seed of the plan, or of the grid's `seeds`.
    """

    condition: Mapping[str, Any]
    best: tuple[Best, ...]
    common: str | None
    missing: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """Sentences."""
        under = " ".join(setting_words(self.condition))
        start = f"{under}: " if under else ""
        if self.missing:
            return [f"{start}no best value: {'; '.join(self.missing)}"]
        lines = [f"{start}{one.sentence}" for one in self.best]
        if self.common is not None:
            lines.append(f"{start}best common {self.best[0].key}: {self.common}, by the mean loss of the arms")
        return lines


def grids(
    families: Sequence[Family], comparisons: Sequence[Comparison], strict: bool = True, seeds: int | None = None
) -> tuple[list[Grid], list[str]]:
    """The families of several comparisons, with their results; and why others are refused (`require_one_version`).

    Args:
        families: of a study.
        comparisons: of all families.
        strict: as of a `Grid`.
        seeds: as of a `Grid`.
    """
    by_name = {one.name: one for one in comparisons}
    found, problems = [], []
    for family in families:
        points = tuple(by_name[member.name] for member in family.members)
        if len(points) > 1:
            try:
                require_one_version(points, family.keys)
            except IncomparableError as error:
                problems.append(f"{family.name}: {error}")
            else:
                found.append(Grid(family, points, strict, seeds))
    return found, problems


def require_one_version(comparisons: Sequence[Comparison], keys: Collection[str]) -> None:
    """Checks that the runs of each arm differ in nothing but the grid's keys, what follows from them, and the seed.

    Raises:
        IncomparableError: naming what differs, such as the data hash, or the text of the primary endpoint.
    """
    arms: dict[str, list[Run]] = {}
    for one in comparisons:
        for name, by_seed in one.runs.items():
            arms.setdefault(name, []).extend(run for runs in by_seed.values() for run in runs)
    everything = [run for runs in arms.values() for run in runs]
    if everything:
        varied = (SEED, ORDER, *keys, *(key for one in comparisons for key in one.plan.varied))
        require_one_measurement(Endpoint(comparisons[0].plan.primary), everything, varied)
    own = {*keys, *(IN_STEPS if STEPS in keys else ())}
    for name, runs in arms.items():
        if differing := differences(runs, (SEED, ORDER), own, one_arm=True, paired=True):
            counts = {key: Counter(map(str, values)).items() for key, values in differing.items()}
            words = "; ".join(
                f"{key}: " + ", ".join(f"{value} ({count} runs)" for value, count in several)
                for key, several in counts.items()
            )
            raise IncomparableError(f"the runs of {name} differ in more than {' and '.join(keys)}: {words}")


def find_grid(plan: Plan, keys: Sequence[str], root: Path, strict: bool = True) -> Grid:
    """The comparison of a plan at every value of one or more keys that finished runs of both arms have.

    Raises:
        ValueError: on an unknown key, or without runs of several values.
        IncomparableError: if the points differ in more than the keys.
    """
    require_settable(dict.fromkeys(keys), "--over")
    values: dict[str, dict[str, dict[str, Any]]] = {}
    for name, arm in plan.parsed.items():
        for run in finished_runs(root, arm.experiment, []):
            config = config_values(run)
            if meets(plan, name, run, config):
                point = {key: config[key] for key in keys}
                values.setdefault(repr(point), {})[name] = point
    points = sorted((next(iter(arms.values())) for arms in values.values() if len(arms) == 2), key=_order)
    if len(points) < 2:
        arms = " and ".join(plan.parsed)
        raise ValueError(f"--over {' '.join(keys)}: {len(points)} values of which {arms} have finished runs in {root}")
    members = []
    for point in points:
        own = replace(plan, where={**plan.where, **point})
        members.append(Member(" ".join(setting_words(point)), own, point))
    family = Family("over " + " and ".join(keys), tuple(keys), tuple(members))
    made = [make_comparison(one.name, one.plan, partial(find_arms, one.plan, root, strict)) for one in members]
    require_one_version(made, keys)
    return Grid(family, tuple(made), strict)


def _order(point: Mapping[str, Any]) -> list[tuple[bool, float, str]]:
    """Numbers by size, then words."""
    numbers = [value if isinstance(value, int | float) else None for value in point.values()]
    words = map(str, point.values())
    return [(number is None, float(number or 0), word) for number, word in zip(numbers, words, strict=True)]


def tune(grid: Grid) -> list[Tuned]:
    """The best values of a grid's tuned key; empty without one."""
    key = grid.tuned
    if key is None:
        return []
    points: dict[str, list[tuple[Any, Comparison]]] = {}
    conditions: dict[str, dict[str, Any]] = {}
    for member, comparison in zip(grid.family.members, grid.comparisons, strict=True):
        condition = {name: value for name, value in member.point.items() if name != key}
        points.setdefault(repr(condition), []).append((member.point[key], comparison))
        conditions[repr(condition)] = condition
    return [_tuned(key, conditions[name], several, grid.seeds) for name, several in points.items()]


def _tuned(
    key: str, condition: Mapping[str, Any], points: Sequence[tuple[Any, Comparison]], count: int | None
) -> Tuned:
    missing = []
    losses: dict[str, dict[str, dict[int, float]]] = {}
    for value, comparison in points:
        absent = {*comparison.plan.seeds[:count]} - {*(comparison.arms.seeds if comparison.arms else ())}
        if comparison.arms is None and not comparison.is_missing:
            missing.append(f"REFUSED at {key}={value}: {str(comparison.problem).splitlines()[0]}")
            continue
        if comparison.arms is None or absent:
            seeds = f"seeds {', '.join(map(str, sorted(absent)))}" if absent else "runs"
            missing.append(f"MISSING at {key}={value}: {seeds}")
            continue
        endpoint = comparison.results[0].endpoint
        for arm, by_seed in comparison.runs.items():
            losses.setdefault(arm, {})[value_word(value)] = {
                seed: fmean(map(endpoint.value, by_seed[seed])) for seed in comparison.arms.seeds
            }
    if missing:
        return Tuned(condition, (), None, tuple(missing))
    best = {arm: best_value(arm, key, by_value) for arm, by_value in losses.items()}
    missing = [no_best(arm, key) for arm, one in best.items() if one is None]
    found = () if missing else tuple(one for one in best.values() if one is not None)
    return Tuned(condition, found, common_value(losses) if found else None, tuple(missing))


@dataclass(frozen=True)
class _Pair:
    """An arm and the last one, each with its best value under a condition, and the points of both by value."""

    name: str
    best: tuple[Best, Best]
    points: Mapping[str, Comparison]

    @property
    def point(self) -> Comparison | None:
        """The point of the grid at which both are at their best; None if they have other best values."""
        first, last = self.best
        return self.points[first.value] if first.value == last.value else None


def at_best(grid: Grid) -> list[Comparison]:
    """Each arm compared with the last, both at their own best value, under every condition.

    Where both have the same best value, that point of the grid is this comparison, and no other is made.
    """
    return [_at_best(pair, grid) for pair in _pairs(grid) if pair.point is None]


def names_at_best(grid: Grid) -> list[str]:
    """The names of the comparisons of arms at their best, points of the grid among them, condition by condition."""
    return [pair.name if pair.point is None else pair.point.name for pair in _pairs(grid)]


def _pairs(grid: Grid) -> list[_Pair]:
    key, found = grid.tuned, list[_Pair]()
    if key is None:
        return found
    for tuned in tune(grid):
        best = {one.arm: one for one in tuned.best}
        final = [*grid.plan.parsed][1]  # the last arm, with which each is compared
        for other in [name for name in best if name != final]:
            several = [
                (member, comparison)
                for member, comparison in zip(grid.family.members, grid.comparisons, strict=True)
                if next(iter(member.plan.parsed)) == other and tuned.condition.items() <= member.point.items()
            ]
            points = {value_word(member.point[key]): comparison for member, comparison in several}
            found.append(_Pair(grid.family.name_at_best(several[0][0]), (best[other], best[final]), points))
    return found


def _at_best(pair: _Pair, grid: Grid) -> Comparison:
    points, key = pair.points, grid.tuned
    assert key is not None
    plan = next(iter(points.values())).plan
    where = {name: value for name, value in plan.where.items() if name != key}
    runs: dict[str, list[Run]] = {}
    forms = {}
    for number, one in enumerate(pair.best):
        chosen = points[one.value]
        assert chosen.arms is not None
        arm = plan.parsed[one.arm]
        forms[one.arm] = {"experiment": arm.experiment, **arm.own, key: chosen.plan.where[key]}
        by_seed = (chosen.arms.first, chosen.arms.second)[number]
        runs[one.arm] = [run for seed in sorted(by_seed) for run in by_seed[seed]]
    own_plan: Plan = replace(plan, arms=forms, where=where)
    told = [OPTIMISTIC, *(one.warning for one in pair.best if one.edge)]

    def find() -> Arms:
        some = next(iter(runs.values()))[0]
        return pair_arms(own_plan, runs, told, some.folder.parent.parent, grid.strict)

    return make_comparison(pair.name, own_plan, find)


def labeled_points(grid: Grid) -> list[tuple[tuple[str, ...], Comparison, float | None]]:
    """Labels, comparison and corrected p-value of every point; points that lack seeds are no tests."""
    tested = [one.results[0] if one.results and not one.results[0].missing else None for one in grid.comparisons]
    corrected = holm([None if result is None else result.statistics.p_difference for result in tested])
    several = "arm" in grid.labels[:1]
    return [
        ((*([next(iter(one.plan.parsed))] if several else []), *map(value_word, member.point.values())), one, p)
        for member, one, p in zip(grid.family.members, grid.comparisons, corrected, strict=True)
    ]


def labeled(grid: Grid) -> dict[str, Comparison]:
    """The comparisons of a grid by the words that tell the points apart."""
    return {" ".join(labels): one for labels, one, _ in labeled_points(grid)}

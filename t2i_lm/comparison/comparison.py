"""A comparison of a study with its results, or with the reason why there are none."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from t2i_lm.comparison.arms import Arms
from t2i_lm.comparison.comparability import MissingRunsError
from t2i_lm.comparison.compare import Result, compare_measured
from t2i_lm.comparison.plan import Plan
from t2i_lm.runtime.tables import listed
from t2i_lm.storage.run_folder import PRIMARY, Run


@dataclass(frozen=True)
class Comparison:
    """A named plan with its runs and results.

    Attributes:
        name: in the study.
        plan: what is compared.
        arms: the runs; None where no seed has both arms, or they cannot be compared.
        results: one per endpoint, the primary one first; empty without `arms`.
        problem: why there are no results.
    """

    name: str
    plan: Plan
    arms: Arms | None
    results: tuple[Result, ...] = ()
    problem: ValueError | None = None

    @property
    def is_missing(self) -> bool:
        """Whether there are no results because runs are missing, not because they are refused."""
        return isinstance(self.problem, MissingRunsError)

    @property
    def runs(self) -> dict[str, Mapping[int, Sequence[Run]]]:
        """The runs of each arm by its name and by seed; empty without `arms`."""
        both = () if self.arms is None else (self.arms.first, self.arms.second)
        return dict(zip(self.plan.parsed, both, strict=self.arms is not None))


def make_comparison(name: str, plan: Plan, find: Callable[[], Arms]) -> Comparison:
    """The comparison of the arms that `find` returns, on their own validation sets, by what they measured.

    A ValueError of `find` or of the comparison becomes the problem.
    """
    try:
        plan, arms, results = compare_measured(*on_their_sets(plan, find()))
        return Comparison(name, plan, arms, tuple(results))
    except ValueError as error:
        return Comparison(name, plan, None, (), error)


def on_their_sets(plan: Plan, arms: Arms) -> tuple[Plan, Arms]:
    """A plan for the validation sets that its runs have, and a note where it names splits of scenes that they lack."""
    sets = arms.runs[0].validation_splits
    own = plan if PRIMARY in sets else plan.on_sets(sets)
    if own == plan:
        return plan, arms
    names, kept = ((one.primary, *one.secondary) for one in (plan, own))
    gone = [name for name in names if name not in kept]
    moved = [name for name in kept if name not in names]
    theirs = f"the validation sets {listed(sets)}" if sets else "one validation set, val"
    note = f"MISSING: validation splits: the {len(arms.runs)} runs have {theirs}; not compared: "
    note += ", ".join(gone)
    if moved:
        note += f"; in their place: {', '.join(moved)}"
    return own, replace(arms, notes=(*arms.notes, note))

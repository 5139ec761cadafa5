"""A comparison of a study with its results, or with the reason why there are none."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from t2i_lm.comparison.arms import Arms
from t2i_lm.comparison.compare import Result, compare
from t2i_lm.comparison.plan import Plan
from t2i_lm.storage.run_folder import Run


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
    def runs(self) -> dict[str, Mapping[int, Sequence[Run]]]:
        """The runs of each arm by its name and by seed; empty without `arms`."""
        both = () if self.arms is None else (self.arms.first, self.arms.second)
        return dict(zip(self.plan.parsed, both, strict=self.arms is not None))


def make_comparison(name: str, plan: Plan, find: Callable[[], Arms]) -> Comparison:
    """The comparison of the arms that `find` returns, of runs with one validation set on it.

    A ValueError of `find` or of the comparison becomes the problem.
    """
    try:
        plan, arms = on_their_sets(plan, find())
        return Comparison(name, plan, arms, tuple(compare(plan, arms)))
    except ValueError as error:
        return Comparison(name, plan, None, (), error)


def on_their_sets(plan: Plan, arms: Arms) -> tuple[Plan, Arms]:
    """A plan for the validation sets that its runs have, and a note where it names splits and they have one set."""
    own = plan if arms.runs[0].validation_splits else plan.on_one_set()
    if own == plan:
        return plan, arms
    names, kept = ((one.primary, *one.secondary) for one in (plan, own))
    gone = [name for name in names if name not in kept]
    moved = [name for name in kept if name not in names]
    note = f"MISSING: validation splits: the {len(arms.runs)} runs have one validation set, val; not compared: "
    note += ", ".join(gone) + (f"; in their place, on val: {', '.join(moved)}" if moved else "")
    return own, replace(arms, notes=(*arms.notes, note))

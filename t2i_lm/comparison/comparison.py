"""A comparison of a study with its results, or with the reason why there are none."""

from collections.abc import Callable
from dataclasses import dataclass

from t2i_lm.comparison.arms import Arms
from t2i_lm.comparison.compare import Result, compare
from t2i_lm.comparison.plan import Plan


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


def make_comparison(name: str, plan: Plan, find: Callable[[], Arms]) -> Comparison:
    """The comparison of the arms that `find` returns, of runs with one validation set on it.

    A ValueError of `find` or of the comparison becomes the problem.
    """
    try:
        arms = find()
        if not arms.runs[0].validation_splits:
            plan = plan.on_one_set()
        return Comparison(name, plan, arms, tuple(compare(plan, arms)))
    except ValueError as error:
        return Comparison(name, plan, None, (), error)

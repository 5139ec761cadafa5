"""Compares two arms over seeds, with intervals and tests: `python -m t2i_lm.compare`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t2i_lm.runtime.command_line import RUNS, command_parser, exit_code, out_file, require_runs

if TYPE_CHECKING:
    from t2i_lm.comparison.plan import Plan

EXAMPLE = """example:
  python -m t2i_lm.compare
  python -m t2i_lm.compare --plan experiments/plans/pretraining.yaml optim.lr=3e-3
  python -m t2i_lm.compare --over optim.lr
  python -m t2i_lm.compare --format latex --out gap.tex

finished runs below --runs that meet the plan are paired by seed; python -m t2i_lm.sweep seed=0,1,2,3,4 makes them. The
primary endpoint and its margin are the plan's, to be written before the runs are made (docs/statistics.md)."""
FORMATS = ("text", "json", "latex")  # keys of comparison.tables.FORMATS


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    arguments = command_parser(
        "compare", "Compare two arms over seeds: differences, intervals, tests of difference and equivalence.", EXAMPLE
    )
    arguments.add_argument("--plan", type=Path, metavar="FILE", help="plan YAML (default: pretrained against scratch)")
    arguments.add_argument("--runs", type=Path, default=RUNS, help="folder of runs (default: %(default)s)")
    arguments.add_argument("--scale", help="overlay of the runs (default: the plan's)")
    arguments.add_argument("--format", choices=FORMATS, default="text", help="of the table (default: %(default)s)")
    arguments.add_argument("--out", type=out_file, metavar="FILE", help="where to write (default: print)")
    arguments.add_argument(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="name differences in the order of the data instead of refusing them",
    )
    arguments.add_argument(
        "--over", action="append", metavar="KEY", help="compare at every value of a key that runs have; may be repeated"
    )
    arguments.add_argument("where", nargs="*", metavar="key=value", help="what runs must have, beside the plan's")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Prints or writes the table; returns the exit code."""
    options = parser().parse_intermixed_args(argv)

    def body() -> int:
        from t2i_lm.comparison.arms import find_arms
        from t2i_lm.comparison.compare import compare, compare_measured
        from t2i_lm.comparison.comparison import on_their_sets
        from t2i_lm.comparison.plan import chosen_plan
        from t2i_lm.comparison.tables import FORMATS as WRITERS

        require_runs(options.runs)
        plan = chosen_plan(options.plan, options.scale, options.where)
        if options.over:
            return over(plan)
        arms = find_arms(plan, options.runs, options.strict)
        plan, arms = on_their_sets(plan, arms)
        if options.plan is None:
            plan, arms, results = compare_measured(plan, arms)
        else:
            results = compare(plan, arms)
        return write(WRITERS[options.format](plan, arms, results))

    def over(plan: "Plan") -> int:
        """The comparison at every value, each arm's best one, and the arms at their best."""
        from t2i_lm.comparison.grid import at_best, find_grid
        from t2i_lm.comparison.grid_tables import grid_json, grid_text
        from t2i_lm.comparison.tables import text

        if options.format == "latex":
            raise ValueError("--format latex: expected text or json with --over")
        grid = find_grid(plan, options.over, options.runs, options.strict)
        if options.format == "json":
            return write(grid_json(grid))
        best = [f"{one.name}\n{text(one.plan, one.arms, one.results)}" for one in at_best(grid) if one.arms is not None]
        return write("\n\n".join([grid_text(grid), *best]))

    def write(table: str) -> int:
        from t2i_lm.storage.writing import write_atomic

        if options.out is None:
            print(table)
        else:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(options.out, f"{table}\n")
            print(options.out)
        return 0

    return exit_code(body)


if __name__ == "__main__":
    sys.exit(main())

"""Trains the runs of a plan, compares them, draws their figures and writes the report: `python -m t2i_lm.study`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.runtime.command_line import add_figures, add_jobs, command_parser, exit_code

EXAMPLE = """example:
  python -m t2i_lm.study experiments/study.yaml --dry-run
  python -m t2i_lm.study experiments/study.yaml --jobs 2
  python -m t2i_lm.study experiments/study.yaml --seeds 1 trainer.max_steps=400

finished runs of the same config are not trained again and interrupted ones resume, so the command can be stopped and
repeated. Runs: RUN.DIR/study. Tables of the comparisons (text and JSON), figures and report.html: --out."""


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    arguments = command_parser(
        "study", "Train the runs of a plan, compare its arms, draw its figures, write its report.", EXAMPLE
    )
    arguments.add_argument("plan", type=Path, help="plan YAML, for example experiments/study.yaml")
    arguments.add_argument("--seeds", type=int, metavar="N", help="only the first N seeds of the plan")
    add_jobs(arguments)
    add_figures(arguments)
    arguments.set_defaults(out=Path("figures/study"))
    arguments.add_argument(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="name runs that differ in more than what is compared instead of refusing them",
    )
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="of every run")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing, compares, draws and reports; returns the exit code of the first run that failed, or 0."""
    options = parser().parse_intermixed_args(argv)

    def body() -> int:
        from t2i_lm.comparison.plan import first_seeds, read_study
        from t2i_lm.training.study import (
            compare_arms,
            estimate,
            figure_runs,
            progress_of,
            progress_table,
            shown_runs,
            study_runs,
            train,
            write_comparisons,
        )

        study = first_seeds(read_study(options.plan), options.seeds)
        runs = study_runs(study, options.plan.parent, options.overrides)
        states = progress_of(runs)
        print(progress_table(runs, states), "", estimate(runs, states, options.jobs), sep="\n", flush=True)
        if options.dry_run:
            return 0
        code = train(runs, options.jobs)
        if code > 128:  # stopped by a signal
            return code
        from t2i_lm.plots.catalogue import Request, write_figures
        from t2i_lm.reporting.page import write_report
        from t2i_lm.reporting.request import ReportRequest
        from t2i_lm.reporting.search import Pool, RunSearch

        comparisons = compare_arms(study, runs, options.strict)
        failed = write_comparisons(comparisons, options.out)
        root, page = figure_runs(runs), options.out / "report.html"
        try:
            write_figures(Request(root, strict=options.strict), options.out)
        except ValueError as error:  # the page says what is missing
            print(f"figures: {error}", file=sys.stderr)
            failed = 2
        finished, notes = shown_runs(runs)
        pool = Pool(tuple(finished), tuple(notes))
        search = RunSearch(root)
        write_report(ReportRequest(comparisons, pool, search, options.plan, options.plan.parent, options.strict), page)
        print(page)
        return code or failed

    return exit_code(body)


if __name__ == "__main__":
    sys.exit(main())

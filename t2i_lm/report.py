"""Writes the study's report, one self-contained page: `python -m t2i_lm.report`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.runtime.command_line import RUNS, add_strict, command_parser, exit_code, out_file

EXAMPLE = """example:
  python -m t2i_lm.report
  python -m t2i_lm.report --runs runs --plan experiments/study.yaml --out report.html --pdf

a section whose runs are missing names the command that makes them; unfinished and other runs that are left out are
named too. python -m t2i_lm.study ends with the same page (docs/report.md)."""
PLAN = Path("experiments/study.yaml")


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    arguments = command_parser(
        "report", "Write one page with the study's answer, figures, samples and sources, from its runs.", EXAMPLE
    )
    arguments.add_argument("--runs", type=Path, default=RUNS, help="folder of runs (default: %(default)s)")
    arguments.add_argument("--plan", type=Path, metavar="FILE", help=f"plan YAML (default: {PLAN}, if there is one)")
    arguments.add_argument("--scale", help="overlay of the runs (default: the plan's)")
    arguments.add_argument("--out", type=out_file, default="report.html", help="the page (default: %(default)s)")
    arguments.add_argument("--pdf", action="store_true", help="write a PDF beside it too, by an installed Chromium")
    add_strict(arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and prints its path; returns the exit code."""
    options = parser().parse_args(argv)

    def body() -> int:
        from t2i_lm.comparison.study_plan import chosen_study
        from t2i_lm.reporting.page import write_report
        from t2i_lm.reporting.pdf import write_pdf
        from t2i_lm.reporting.request import ReportRequest
        from t2i_lm.reporting.search import RunSearch
        from t2i_lm.training.study import experiments_of
        from t2i_lm.training.study_results import results_of

        if not options.runs.is_dir():
            raise ValueError(f"--runs {options.runs}: no such folder")
        plan = options.plan or (PLAN if PLAN.is_file() else None)
        study = chosen_study(plan, options.scale)
        search = RunSearch(options.runs)
        if options.scale is not None:
            search.require_scale(options.scale)
        results = results_of(study, search.comparisons(study, options.strict), options.strict)
        beside = experiments_of(plan) if plan is not None else PLAN.parent
        experiments = beside if (beside / "base.yaml").is_file() else PLAN.parent
        pool = search.figure_pool()
        request = ReportRequest(results.answer_first, pool, search, plan, experiments, options.strict, results)
        write_report(request, options.out)
        print(options.out)
        if options.pdf:
            print(write_pdf(options.out))
        return 0

    return exit_code(body)


if __name__ == "__main__":
    sys.exit(main())

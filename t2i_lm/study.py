"""Trains the runs of a plan, then compares them and draws their figures: `python -m t2i_lm.study`."""

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
repeated. Runs: RUN.DIR/study. Tables of the comparisons (text and JSON) and figures: --out."""


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    arguments = command_parser("study", "Train the runs of a plan, compare its arms, draw its figures.", EXAMPLE)
    arguments.add_argument("plan", type=Path, help="plan YAML, for example experiments/study.yaml")
    arguments.add_argument("--seeds", type=int, metavar="N", help="only the first N seeds of the plan")
    add_jobs(arguments)
    add_figures(arguments)
    arguments.set_defaults(out=Path("figures/study"))
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="of every run")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing, compares and draws; returns the exit code of the first run that failed, or 0."""
    options = parser().parse_intermixed_args(argv)

    def body() -> int:
        from t2i_lm.comparison.plan import first_seeds, read_study
        from t2i_lm.training.study import (
            estimate,
            figure_runs,
            progress_of,
            progress_table,
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

        failed = write_comparisons(study, runs, options.out)
        write_figures(Request(figure_runs(runs), strict=True), options.out)
        return code or failed

    return exit_code(body)


if __name__ == "__main__":
    sys.exit(main())

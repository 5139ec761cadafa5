"""Trains the runs of a plan, compares them, draws their figures and writes the report: `python -m t2i_lm.study`."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from t2i_lm.runtime.command_line import add_figures, add_jobs, command_parser, exit_code, failure

EXAMPLE = """example:
  python -m t2i_lm.study experiments/study.yaml --dry-run
  python -m t2i_lm.study experiments/study.yaml --jobs 2
  python -m t2i_lm.study experiments/study.yaml --seeds 1 trainer.max_steps=400
  python -m t2i_lm.study experiments/plans/learning_rates.yaml --results docs/results --dry-run
  python -m t2i_lm.study experiments/plans/ratio.yaml --results docs/results --no-train

finished runs of the same config are not trained again and interrupted ones resume, so the command can be stopped and
repeated; with --results, runs whose results were collected there are finished, too. Runs: RUN.DIR/study. Tables of the
comparisons (text and JSON), figures and report.html: --out."""


OUT = "figures/PLAN"  # PLAN: name of the plan file


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    arguments = command_parser(
        "study", "Train the runs of a plan, compare its arms, draw its figures, write its report.", EXAMPLE
    )
    arguments.add_argument("plan", type=Path, help="plan YAML, for example experiments/study.yaml")
    arguments.add_argument(
        "--seeds", type=int, metavar="N", help="only the first N seeds of the plan; a verdict requires all"
    )
    add_jobs(arguments)
    arguments.add_argument("--results", type=Path, metavar="DIR", help="collected results whose runs are not trained")
    arguments.add_argument(
        "--no-train",
        dest="train",
        action="store_false",
        help="train and measure nothing: tables, figures and report of the finished runs",
    )
    add_figures(arguments, OUT)
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
        from t2i_lm.comparison.relearning import relearning_command
        from t2i_lm.comparison.study_plan import read_study
        from t2i_lm.experiment.required_files import print_missing
        from t2i_lm.reporting.measurements import missing_measurements
        from t2i_lm.training.cost import estimate
        from t2i_lm.training.jobs import is_first_of
        from t2i_lm.training.study import (
            compare_arms,
            experiments_of,
            progress_of,
            progress_table,
            study_runs,
            train,
            without_relearning,
        )
        from t2i_lm.training.study_results import results_of, write_results

        study = read_study(options.plan)
        experiments = experiments_of(options.plan)
        out = Path(OUT).with_name(options.plan.stem) if options.out == Path(OUT) else options.out
        runs = study_runs(study, experiments, options.overrides, options.results, options.seeds)
        states = progress_of(runs)
        print(progress_table(runs, states), "", sep="\n", flush=True)
        to_train = [run.job.config for run, state in zip(runs, states, strict=True) if not state.finished]
        missing = print_missing(to_train) if options.train else 0
        if options.dry_run or (options.train and not missing):
            print(estimate(runs, states, options.jobs), flush=True)
        if options.dry_run or missing:
            return missing
        if not options.train and not any(state.finished for state in states):
            raise ValueError(f"--no-train: no run of {options.plan} is finished, so there is nothing to draw")
        code = train(runs, options.jobs) if options.train else 0
        if code > 128 or not is_first_of([run.job for run in runs]):  # stopped by a signal, or another rank
            return code
        unmeasured = without_relearning(study, runs) if options.train else []
        relearned = _run_all(map(relearning_command, unmeasured))
        comparisons = compare_arms(study, runs, options.strict, _training_command(options))
        results = results_of(study, comparisons, options.strict, options.seeds)
        failed = write_results(results, out)
        first = results.answer_first[:1] if options.train and not code else []
        measured = _run_all(command for one in first for command in missing_measurements(study.measure, one, out))
        from t2i_lm.reporting.study_page import write_page

        return (
            code
            or write_page(study, runs, results, options.plan, experiments, out, options.strict)
            or relearned
            or measured
            or failed
        )

    return exit_code(body)


def _training_command(options: argparse.Namespace) -> str:
    """The command that trains the runs of the plan, those that --seeds leaves out among them."""
    results = [] if options.results is None else ["--results", str(options.results)]
    return shlex.join(["python", "-m", "t2i_lm.study", str(options.plan), *results, *options.overrides])


def _run_all(commands: Iterable[Sequence[str]]) -> int:
    """Runs `python -m` with each list of arguments; the exit code of the first that failed, or 0."""
    from t2i_lm.runtime.launch import without_launcher

    failed = 0
    for arguments in commands:
        command = ["python", "-m", *arguments]
        print("==", shlex.join(command), flush=True)
        code, words = failure(
            subprocess.run([sys.executable, *command[1:]], env=without_launcher(os.environ)).returncode
        )
        if code:
            print(f"== {shlex.join(command)}: {words}", file=sys.stderr)
        failed = failed or code
    return failed


if __name__ == "__main__":
    sys.exit(main())

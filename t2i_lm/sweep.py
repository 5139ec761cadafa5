"""Trains arms at several values of one or two config keys and compares them: `python -m t2i_lm.sweep`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from t2i_lm.runtime.command_line import add_figures, add_jobs, add_scale, add_strict, command_parser, exit_code
from t2i_lm.training.equal_runs import require_no_results
from t2i_lm.training.jobs import Job, list_jobs, train_and_draw, unfinished
from t2i_lm.training.sweep import ARMS, SweepPoint, finished_runs, sweep_jobs

EXAMPLE = """example:
  python -m t2i_lm.sweep optim.lr=1.5e-3,3e-3,6e-3 --jobs 2
  python -m t2i_lm.sweep seed=0,1,2 --jobs 2
  python -m t2i_lm.sweep optim.lr=3e-3,6e-3 seed=0,1,2 --arm t2i_pretrained --arm t2i_scratch --arm t2i_shuffled
  python -m t2i_lm.sweep optim.lr=1.5e-3,3e-3,6e-3 data.batch_size=8,16,32 --jobs 2

one or two keys are swept, their values separated by commas; several seeds beside them give ranges, and alone means and
standard deviations. A batch size is swept at equal tokens, unless with --equal steps. A finished run of the same config
is not trained again, an interrupted one resumes. Runs: RUN.DIR/sweep."""


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    arguments = command_parser("sweep", "Train arms at several values of keys; draw held-out losses.", EXAMPLE)
    arguments.add_argument("--arm", action="append", metavar="NAME", help=f"experiment (default: {', '.join(ARMS)})")
    add_scale(arguments)
    add_jobs(arguments)
    add_figures(arguments)
    add_strict(arguments)
    arguments.add_argument(
        "--equal", choices=("tokens", "steps"), default="tokens", help="what runs of a swept batch size share"
    )
    arguments.add_argument("keys", nargs="*", metavar="key=value[,value...]", help="swept, or for every run")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the remaining runs and draws; returns the exit code of the first run that failed, or 0."""
    options = parser().parse_intermixed_args(argv)

    def body() -> int:
        equal_tokens = options.equal == "tokens"
        keys, jobs = sweep_jobs(options.keys, options.arm or ARMS, options.scale, equal_tokens=equal_tokens)
        remaining = unfinished(list(jobs.values()))
        if options.dry_run:
            return list_jobs(remaining)
        roots = {Path(job.config.run.dir) for job in remaining}
        require_no_results({*roots, *(root.parent for root in roots)})  # `run.dir` is given without `sweep/`
        return train_and_draw([*jobs.values()], remaining, options.jobs, lambda: write_figure(keys, jobs))

    def write_figure(keys: Sequence[str], jobs: Mapping[SweepPoint, Job]) -> int:
        """The figure of the finished runs, if there are any, with its tables."""
        from t2i_lm.comparison.comparability import require_comparable
        from t2i_lm.plots.groups import arms_of
        from t2i_lm.plots.panels import save_figure
        from t2i_lm.plots.sweep import Outcome, varied_in
        from t2i_lm.plots.sweep_grid import caption_of, draw, tables_of

        runs = finished_runs(jobs)
        arms = arms_of(dict.fromkeys(arm for arm, *_ in runs))
        outcomes = [Outcome(arms[arm], values[: len(keys)], run) for (arm, *values), run in runs.items()]
        if outcomes:
            if options.strict:
                named = {f"{one.arm} {' '.join(one.values)} seed {one.run.config['seed']}": one.run for one in outcomes}
                require_comparable(named, varied_in(keys))
            caption, stem = caption_of(keys, outcomes), "_".join(["figure_sweep", *keys]).replace(".", "_")
            title = f"Sweep of {' and '.join(keys)}"
            paths = save_figure(draw(keys, outcomes, caption), options.out / stem, title, caption)
            print(*paths, "", tables_of(keys, outcomes), sep="\n")
        return 0

    return exit_code(body)


if __name__ == "__main__":
    sys.exit(main())

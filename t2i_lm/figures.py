"""Writes the study's figures: `python -m t2i_lm.figures`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.runtime.command_line import RUNS, add_strict, command_parser, exit_code, out_folder, require_runs

EXAMPLE = """example:
  python -m t2i_lm.figures
  python -m t2i_lm.figures --figure 4 --runs runs --out figures
  python -m t2i_lm.figures --table

without --pretrained and --scratch, the newest two runs are drawn that agree in data hash, seed,
scale, trainer.max_steps, log.interval and log.ema."""
NAMES = (
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "inits",
    "forgetting",
    "gap",
    "relearning",
    "remedies",
)  # keys of plots.catalogue.FIGURES


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = command_parser(
        "figures", "Draw the study's figures from the metrics of its runs, as PNG and PDF.", EXAMPLE
    )
    arguments.add_argument("--runs", type=Path, default=RUNS, help="folder of runs (default: %(default)s)")
    arguments.add_argument("--out", type=out_folder, default="figures", help="where to write (default: %(default)s)")
    arguments.add_argument("--pretrained", type=Path, metavar="RUN", help="run folder of the pre-trained arm")
    arguments.add_argument("--scratch", type=Path, metavar="RUN", help="run folder of the random arm")
    add_strict(arguments)
    arguments.add_argument("--figure", choices=NAMES, action="append", help="only this one; may be repeated")
    arguments.add_argument("--table", action="store_true", help="only Table 1, completions: table1.md and table1.tex")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the figures, prints their paths and tables; returns the exit code."""
    options = parser().parse_args(argv)

    def body() -> int:
        if options.table and options.figure:
            raise ValueError("--table: writes Table 1 alone; not with --figure")
        require_runs(options.runs)
        from t2i_lm.plots.catalogue import Request, write_figures, write_table1

        request = Request(options.runs, options.pretrained, options.scratch, options.strict)
        if options.table:
            return write_table1(request, options.out)
        return write_figures(request, options.out, options.figure)

    return exit_code(body)


if __name__ == "__main__":
    sys.exit(main())

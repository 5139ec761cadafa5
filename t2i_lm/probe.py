"""Looks inside finished runs, a figure and a sentence per probe: `python -m t2i_lm.probe`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.runtime.command_line import command_parser, exit_code, out_folder

EXAMPLE = """example:
  python -m t2i_lm.probe runs/t2i_pretrained runs/t2i_scratch
  python -m t2i_lm.probe runs/t2i_pretrained --only gradients --out probes

tokens: entropies, Zipf slope and compression of captions and image ids; rows: norms and geometry of the token rows over
training; similarity: CKA and weight distance by layer; attention: its distance, and its share on the caption;
gradients: cosine between the gradients of text and of image loss. Each writes NAME.png, NAME.pdf and NAME.json
(docs/probes.md)."""
NAMES = ("tokens", "rows", "similarity", "attention", "gradients")  # keys of analysis.suite.PROBES


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = command_parser(
        "probe", "Probe finished runs: their data, token rows, hidden states, attention and gradients.", EXAMPLE
    )
    arguments.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder; the first is the reference")
    arguments.add_argument("--only", choices=NAMES, action="append", default=[], help="this probe; may be repeated")
    arguments.add_argument("--out", type=out_folder, default="probes", help="where to write (default: %(default)s)")
    arguments.add_argument(
        "--sequences",
        type=int,
        default=64,
        metavar="N",
        help="held-out sequences of similarity and attention (default: %(default)s)",
    )
    arguments.add_argument(
        "--batches", type=int, default=8, metavar="N", help="training batches of gradients (default: %(default)s)"
    )
    arguments.add_argument(
        "--varied",
        action="append",
        default=[],
        metavar="KEY",
        help="key in which the runs differ by design, beside init; may be repeated",
    )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the figures and numbers, prints a sentence each; returns the exit code."""
    options = parser().parse_args(argv)

    def body() -> int:
        for name, least in (("sequences", 2), ("batches", 1)):
            if getattr(options, name) < least:
                raise ValueError(f"--{name} {getattr(options, name)}: expected at least {least}")
        from t2i_lm.analysis.base import Settings
        from t2i_lm.analysis.suite import run_probes

        settings = Settings(sequences=options.sequences, batches=options.batches)
        run_probes(options.runs, options.out, options.only, settings, options.varied)
        return 0

    return exit_code(body)


if __name__ == "__main__":
    sys.exit(main())

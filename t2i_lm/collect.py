"""Copies finished runs as compact results into the repository: `python -m t2i_lm.collect`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.runtime.command_line import RUNS, command_parser, exit_code, out_folder

EXAMPLE = """example:
  python -m t2i_lm.collect
  python -m t2i_lm.collect runs/study runs/sweep
  python -m t2i_lm.collect runs/t2i_pretrained/20260102-030405-demo --images
  python -m t2i_lm.report --runs docs/results --plan experiments/plans/positions.yaml

A run keeps its place below --runs. The results, some 30 kB a run, are drawn, compared and reported as run folders are,
with equal numbers; they hold no checkpoints and no path of this machine. Unfinished runs, and runs that cannot be
compared with those of their setting, are named and left out."""


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    arguments = command_parser("collect", "Copy finished runs as compact results into the repository.", EXAMPLE)
    arguments.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="runs, or folders of them, in --runs"
    )
    arguments.add_argument("--runs", type=Path, default=RUNS, help="folder of runs (default: %(default)s)")
    arguments.add_argument(
        "--out", type=out_folder, default="docs/results", help="folder of results (default: %(default)s)"
    )
    arguments.add_argument(
        "--images", action="store_true", help="also samples and figures of probes, for the report and Figure 1"
    )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Collects the runs and prints what was added; returns 0, or 2 if a run was left out."""
    options = parser().parse_args(argv)

    def body() -> int:
        from t2i_lm.comparison.collect import collect

        if options.images:
            from t2i_lm.comparison.collected_images import image_files
        done = collect(options.runs, options.folders, options.out, image_files if options.images else None)
        for folder, (size, kept, lines) in done.added.items():
            print(f"{folder}  {size / 1000:.1f} kB, {kept} of {lines} training lines")
        for folder, size in done.known.items():
            if size:
                print(f"{folder}  {size / 1000:.1f} kB added")
        total = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
        known = f", {len(done.known)} were there already" if done.known else ""
        print(f"{len(done.added)} runs collected{known}; {options.out} has {total / 1e6:.2f} MB")
        for line in done.refused:
            print(f"left out: {line}", file=sys.stderr)
        return 2 if done.refused else 0

    return exit_code(body)


if __name__ == "__main__":
    sys.exit(main())

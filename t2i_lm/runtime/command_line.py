"""The shared command line: parser, common options, one-line errors."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from t2i_lm.config.experiment import SCALES

# Errors that end a command with one line; any other is a fault of this suite and keeps its traceback.
FAILURES = (ValueError, OSError, FloatingPointError, MemoryError)
# Overrides of commands that compare losses: no samples are generated unless a later override requests them.
NO_SAMPLES = ("samples.prompts=0", "samples.preference_scenes=0", "samples.interval=null")


def command_parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    """The parser of `python -m t2i_lm.COMMAND`, whose help ends with an example."""
    return argparse.ArgumentParser(
        prog=f"python -m t2i_lm.{command}",
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def exit_code(body: Callable[[], int]) -> int:
    """Runs a command's body and returns its exit code: 2 after printing one line for any of `FAILURES`."""
    try:
        return body()
    except FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def add_scale(parser: argparse.ArgumentParser) -> None:
    """Adds `--scale`."""
    parser.add_argument(
        "--scale", default="demo", help=f"overlay in scale/: {', '.join(SCALES)} (default: %(default)s)"
    )


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Adds `--jobs`."""
    parser.add_argument("--jobs", type=int, default=1, help="runs trained at once (default: %(default)s)")


def add_strict(parser: argparse.ArgumentParser) -> None:
    """Adds `--strict` of commands that compare runs."""
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse runs that differ in more than what is compared (default: name it)",
    )


def add_figures(parser: argparse.ArgumentParser) -> None:
    """Adds `--out` and `--dry-run` of commands that train several runs and draw their figure."""
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder of figures (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the runs to train; train nothing")

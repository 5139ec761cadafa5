"""Options that several commands have."""

import argparse

from t2i_lm.config.load import SCALES

# What a run says in one line; anything else is a fault of this suite and keeps its traceback.
FAILURES = (ValueError, OSError, FloatingPointError, MemoryError)
# Of commands that compare losses: no images, unless asked for after these.
NO_IMAGES = ("samples.prompts=0", "samples.preference_scenes=0", "samples.interval=null")


def add_scale(arguments: argparse.ArgumentParser) -> None:
    """`--scale`: how big."""
    arguments.add_argument(
        "--scale", default="demo", help=f"overlay in scale/: {', '.join(SCALES)} (default: %(default)s)"
    )


def add_jobs(arguments: argparse.ArgumentParser) -> None:
    """`--jobs`: how many runs at once."""
    arguments.add_argument("--jobs", type=int, default=1, help="runs made at once (default: %(default)s)")

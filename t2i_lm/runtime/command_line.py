"""The shared command line: parser, common options, one-line errors."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t2i_lm.config.experiment import SCALES
from t2i_lm.config.values import UTF8_REQUIRED, as_text
from t2i_lm.runtime.output import escaped, last_to_the_end
from t2i_lm.storage.reading import DEBUG, shows_traceback
from t2i_lm.storage.writing import is_disk_error, problem

# Errors that end a command with one line; any other is a fault of this suite and keeps its traceback.
FAILURES = (ValueError, OSError, FloatingPointError, MemoryError)
SCALE = "demo"  # without --scale
RUNS = Path("runs")  # without --runs
# Overrides of commands that compare losses: no samples are generated unless a later override requests them.
NO_SAMPLES = ("samples.prompts=0", "samples.preference_scenes=0", "samples.interval=null")


def command_parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
    """The parser of `python -m t2i_lm.COMMAND`, whose help ends with an example."""
    last_to_the_end()
    # Warnings of torch's C++ code, which repeat with a stack what the watch over ranks says in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    parser = argparse.ArgumentParser(
        prog=f"python -m t2i_lm.{command}",
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--debug", action=_Debug, nargs=0, default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    return parser


class _Debug(argparse.Action):
    """Sets the variable that processes of this command inherit."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        os.environ[DEBUG] = "1"


def exit_code(body: Callable[[], int]) -> int:
    """Runs a command's body and returns its exit code: 2 after one line for any of `FAILURES`, 130 after Ctrl-C.

    The traceback is printed before it if T2I_LM_DEBUG is set, which `--debug` does.
    """
    last_to_the_end()
    try:
        return body()
    except KeyboardInterrupt:
        if shows_traceback():
            traceback.print_exc()
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except FAILURES as error:
        if shows_traceback():
            traceback.print_exc()
        message = problem(error) if is_disk_error(error) else str(error) or type(error).__name__
        if error.__cause__ is not None:  # may quote a library, whose messages have several lines
            message = " ".join(message.split())
        if isinstance(error, UnicodeEncodeError) and sys.getfilesystemencoding() != "utf-8":
            message = f"{as_text(error.object)!r}: {UTF8_REQUIRED}"
        print(f"error: {escaped(message)}", file=sys.stderr)
        return 2


def failure(code: int) -> tuple[int, str]:
    """The exit code of a command whose process failed with a code, and how that ended in words; 0 for 0.

    Codes above 128 are left to signals to the command itself: a process that a signal ended alone is a failure.
    """
    number = -code if code < 0 else code - 128
    if number not in signal.valid_signals():
        return 1 if code > 128 else code, f"failed with code {code}"
    known = {one.value: one.name for one in signal.Signals}
    words = f"{'killed' if code < 0 else 'stopped'} by {known.get(number, f'signal {number}')}"
    return 1, words + (" (perhaps for lack of memory)" if code == -signal.SIGKILL else "")


def out_folder(text: str) -> Path:
    """A folder to write, for `type=` of an option."""
    path = Path(text)
    try:
        nearest = next(one for one in (path, *path.absolute().parents) if one.exists())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected a folder, {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text}: {nearest} cannot be written to")
    return path


def out_file(text: str) -> Path:
    """A file to write, for `type=` of an option."""
    path = Path(text)
    out_folder(str(path.parent))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: expected a file, it is a folder")
    return path


def require_runs(folder: Path) -> None:
    """Checks that the folder of `--runs` exists; where the default does not, the message names what makes runs.

    Raises:
        ValueError: naming it.
    """
    if folder != RUNS and not folder.is_dir():
        raise ValueError(f"--runs {folder}: no such folder")


def add_scale(parser: argparse.ArgumentParser) -> None:
    """Adds `--scale`."""
    parser.add_argument("--scale", default=SCALE, help=f"overlay in scale/: {', '.join(SCALES)} (default: %(default)s)")


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Adds `--jobs`."""
    parser.add_argument("--jobs", type=int, default=1, help="runs trained at once (default: %(default)s)")


def add_strict(parser: argparse.ArgumentParser) -> None:
    """Adds `--strict` of commands that compare runs."""
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse unfinished runs, and those that differ in more than what is compared (default: name them)",
    )


def add_figures(parser: argparse.ArgumentParser, out: str = "figures") -> None:
    """Adds `--out` and `--dry-run` of commands that train several runs and draw their figure."""
    parser.add_argument("--out", type=out_folder, default=out, help="folder of figures (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the runs to train and their time; make none")

"""All benchmarks in a row, one process each, and a table of their numbers at the end.

Every script has its own time limit, and all of them together have one: what does not end is stopped, said, and the
rest still runs. A result line is printed as soon as its script has ended. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLE = "python -m benchmarks.suite --gpu --only head draw_256"
GPU_SECONDS = 480  # all benchmarks of `--gpu`, set-up included
# Fields of a result line that the table lists, by benchmark: what was measured, then ratios.
FIELDS = {
    "train_step": ("tokens_per_s", "mfu", "times_ours"),
    "trainer_overhead": ("tokens_per_s", "mfu", "overhead_percent"),
    "head": ("seconds", "peak_mib", "times_ours"),
    "generate": ("ids_per_s", "first_call_seconds", "times_ours"),
    "encode": ("images_per_s", "equal_ids"),
    "loader": ("samples_per_s", "times_ours"),
    "fid": ("seconds", "times_ours"),
    "saves": ("stall_seconds", "write_seconds", "stall_percent", "cost_percent", "extra_memory"),
    "demo": ("seconds",),
}


@dataclass(frozen=True)
class Entry:
    """One benchmark of the suite.

    Attributes:
        name: for `--only`.
        command: arguments of the Python interpreter after `-m`.
        limit: seconds before it is stopped.
    """

    name: str
    command: tuple[str, ...]
    limit: float


def script(name: str, arguments: str = "", limit: float = 3600, entry: str | None = None) -> Entry:
    """A script of this folder."""
    return Entry(entry or name, (f"benchmarks.{name}", *arguments.split()), limit)


# On any machine, at the demo's shape.
CPU = (
    *(script(name) for name in ("train_step", "head", "generate", "loader", "trainer_overhead", "fid")),
    script("saves", "--rounds 3"),  # each writes some 15 GB
    script("encode", "--batch 1"),
)
_DRAW = "--shape paper --prompt 64 --tokens 1024 --precision bf16 --alone --rounds 1"
# At the paper's shape on one GPU of 80 GB; the cheapest and most wanted first. Limits, not estimates.
GPU = (
    script("head", "--tokens 16128 --precision bf16 --rounds 5", 60),
    script("train_step", "--shape paper --peers transformers --rounds 5", 150),
    script("trainer_overhead", "--shape paper --compile --accumulate 4 --steps 40 --rounds 1", 120, "trainer"),
    # Weights and moments of 1.5B parameters, whose files would take minutes.
    script("saves", "--copy-only --gigabytes 18 --rounds 5", 60),
    script("generate", f"{_DRAW} --batch 64", 90, "draw_64"),
    script("generate", f"{_DRAW} --batch 256", 90, "draw_256"),
    script("encode", "--shape movqgan_270m --batch 64 --rounds 3", 90),
    Entry("demo", ("t2i_lm.train", "experiments/t2i_pretrained.yaml", "--scale", "demo"), 90),
)


def options(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parses the arguments; those it does not know are for every script."""
    arguments = argparse.ArgumentParser(
        prog="python -m benchmarks.suite",
        description="All benchmarks in a row, one process each, and a table of their numbers.",
        epilog=f"example:\n  {EXAMPLE}\n\nOther options, such as --rounds, are passed on to every script.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("--gpu", action="store_true", help="at the paper's shape, on one GPU of 80 GB")
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="these benchmarks alone")
    arguments.add_argument("--open-lm", metavar="PATH", help="checkout of mlfoundations/open_lm, another peer")
    arguments.add_argument("--seconds", type=float, help=f"for all together (default: {GPU_SECONDS} with --gpu)")
    arguments.add_argument("--quick", action="store_true", help="smoke test of every script: tiny sizes, no result")
    return arguments.parse_known_args(argv)


def entries(given: argparse.Namespace) -> list[Entry]:
    """The chosen benchmarks with their arguments.

    Raises:
        ValueError: on an unknown name.
    """
    chosen = list(GPU if given.gpu else CPU)
    if given.gpu and given.open_lm:
        chosen.insert(2, script("train_step", "--shape paper --peers open_lm --rounds 5", 120, "open_lm"))
    names = [entry.name for entry in chosen]
    for name in given.only or ():
        if name not in names:
            raise ValueError(f"--only {name}: expected one of {', '.join(names)}")
    return [entry for entry in chosen if entry.name in (given.only or names)]


def arguments_of(entry: Entry, given: argparse.Namespace, more: Sequence[str], folder: Path) -> list[str]:
    """The whole command of a benchmark."""
    command = [sys.executable, "-m", *entry.command]
    if entry.name == "demo":
        return [*command, f"run.dir={folder}", *(["trainer.max_steps=2"] if given.quick else [])]
    if given.open_lm and entry.command[0] == "benchmarks.train_step" and entry.name != "train_step" * given.gpu:
        command += ["--open-lm", given.open_lm]
    command += ["--quick", "--rounds", "1"] if given.quick else []
    command += ["--device", "cuda"] if given.gpu and not given.quick else []
    return [*command, *more]


def run(entry: Entry, command: Sequence[str], limit: float) -> tuple[dict[str, Any] | None, str]:
    """The result line of a benchmark, which is printed at once, or None; and how it ended."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return None, f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:  # also when interrupted: with its children
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.perf_counter() - start
        output.seek(0)
        lines = output.read().splitlines()
    if process.returncode:
        return None, f"failed with exit code {process.returncode} after {seconds:.0f} s"
    found = {"benchmark": "demo", "seconds": round(seconds, 1)} if entry.name == "demo" else json.loads(lines[-1])
    print(json.dumps(found), flush=True)
    return found, f"{seconds:.0f} s"


def numbers(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What the table lists of a result: (name, number), of a spread the median."""
    for field in FIELDS[found["benchmark"]]:
        value = found.get(field)
        for part, number in value.items() if isinstance(value, dict) and "median" not in value else [("", value)]:
            if number is not None:
                yield f"{field} {part}".strip(), number["median"] if isinstance(number, dict) else number


def table(rows: Sequence[tuple[str, dict[str, Any] | None, str]]) -> str:
    """One line per number: benchmark, what, value; a benchmark without a result has a line of its own."""
    lines = [("benchmark", "what", "value")]
    for name, found, ending in rows:
        lines.append((name, "time", ending))
        lines += [
            (name, what, f"{number:,.4g}" if abs(number) < 1e4 else f"{number:,.0f}")
            for what, number in (numbers(found) if found else ())
        ]
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    return "\n".join(f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  {line[2]}" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite; 1 if a benchmark has no result."""
    given, more = options(argv)
    try:
        chosen = entries(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    total = given.seconds or (GPU_SECONDS if given.gpu else float("inf"))
    end, rows = time.perf_counter() + total, []
    with tempfile.TemporaryDirectory() as folder:
        for entry in chosen:
            left = end - time.perf_counter()
            command = arguments_of(entry, given, more, Path(folder))
            print(f"{entry.name}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
            found, ending = run(entry, command, min(entry.limit, left)) if left > 0 else (None, "no time left")
            if found is None:
                print(f"error: {entry.name}: {ending}", file=sys.stderr, flush=True)
            rows.append((entry.name, found, ending))
    print(table(rows), flush=True)
    return int(any(found is None for _, found, _ in rows))


if __name__ == "__main__":
    sys.exit(main())

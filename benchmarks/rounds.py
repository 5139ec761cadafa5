"""How everything here is measured: correctness first, then interleaved rounds, then one JSON line.

In each round every contender runs once, in an order that is rotated from round to round, and times are divided
*within* the round: drifting clocks and neighbors hit both sides of a ratio alike. Standard library only, so that
`--help` answers at once; torch is imported by whoever measures.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

OURS = "t2i_lm"
# Load average above which somebody else was computing too, and the line says so.
NOISY_LOAD = 0.3
# Option -> how it saves memory.
SMALLER = {
    "batch": "a smaller --batch",
    "peers": "fewer --peers",
    "alone": "--alone",
    "tokens": "fewer --tokens",
    "shape": "--shape demo",
}
PACKAGES = ("torch", "lightning", "transformers", "datasets", "numpy", "scipy", "torchmetrics", "litgpt", "t2i_lm")


class GateError(RuntimeError):
    """Implementations that must agree do not: their times would compare different things."""


@dataclass(frozen=True)
class Contender:
    """One implementation in one form.

    Attributes:
        name: what its times are listed under.
        family: implementation; of its forms (eager, compiled) the fastest counts.
        run: one repetition of the work.
        before: what makes it ready each time, not timed.
    """

    name: str
    family: str
    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


def parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    arguments = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        epilog=f"example:\n  {example}\n\nThe last line of the output is one JSON object: the result.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument("--rounds", type=_count, default=9, help="interleaved rounds (default: %(default)s)")
    arguments.add_argument("--threads", type=_count, help="CPU threads (default: torch's own choice)")
    arguments.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    arguments.add_argument("--no-compile", action="store_true", help="leave torch.compile's contenders out")
    arguments.add_argument("--quick", action="store_true", help="tiny sizes, not compiled: does it run? no result")
    return arguments


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def answer(measure: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Runs a benchmark; its exit code is 1 where the contenders disagree or cannot be built, 2 where a GPU is full."""
    try:
        measure(options)
    except (GateError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from t2i_lm.runtime.devices import is_gpu_full

        if not is_gpu_full(error):
            raise
        smaller = [what for key, what in SMALLER.items() if key in vars(options)]
        print(f"error: out of GPU memory; what takes less: {', '.join(smaller)}", file=sys.stderr)
        return 2
    return 0


class Report:
    """The one JSON line; makes `options.device` and the number of threads definite."""

    def __init__(self, benchmark: str, options: argparse.Namespace) -> None:
        self.benchmark, self.options = benchmark, options
        self.date = datetime.now(UTC).isoformat(timespec="seconds")
        self.load_before = os.getloadavg()[0]  # before torch is imported, which is load too
        import torch

        if options.threads:
            torch.set_num_threads(options.threads)
        options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.threads = torch.get_num_threads()

    def write(self, **numbers: Any) -> None:
        """Prints the line. Paths are left out: it is made to be copied into RESULTS.md."""
        given = {key: value for key, value in vars(self.options).items() if not isinstance(value, Path)}
        line = {
            "benchmark": self.benchmark,
            "date": self.date,
            "machine": _machine(self.options.device),
            "versions": _versions(),
            "threads": self.threads,
            "load": [round(self.load_before, 2), round(os.getloadavg()[0], 2)],
            "noisy": self.load_before > NOISY_LOAD,
            "settings": given,
            **numbers,
        }
        print(json.dumps(line), flush=True)


def _machine(device: str) -> dict[str, Any]:
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def can_compile(options: argparse.Namespace) -> bool:
    """Whether torch.compile's contenders take part; says why not."""
    from t2i_lm.runtime import devices

    return not (options.no_compile or options.quick) and devices.can_compile("contenders of torch.compile")


def gate(what: str, found: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest difference relative to the largest expected value.

    Raises:
        GateError: if it is above the tolerance, or no number.
    """
    if found.shape != expected.shape:
        raise GateError(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    differ = (found.detach().double() - expected.detach().double()).abs().max()
    error = float(differ / expected.detach().double().abs().max().clamp(min=1e-30))
    if not error <= tolerance:  # a nan is above every tolerance
        raise GateError(f"{what} differs by {error:.2e} of the largest value, allowed is {tolerance:.0e}: not timed")
    return error


def seconds_of(run: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one repetition by a clock, on a GPU until it is idle again."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def interleave(
    contenders: Sequence[Contender],
    rounds: int,
    warmup: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after `warmup` unmeasured repetitions of each.

    `clock` is the wall's by default; `time.process_time` leaves out what neighbors take, where one thread computes.
    """
    for contender in contenders:
        for _ in range(warmup):
            contender.before()
            contender.run()
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.disable()  # otherwise the garbage of one contender is collected on another's time
    try:
        for number in range(rounds):
            shift = number % len(contenders)
            for contender in [*contenders[shift:], *contenders[:shift]]:
                contender.before()
                seconds[contender.name].append(seconds_of(contender.run, device, clock))
            gc.collect()
    finally:
        gc.enable()
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the range between the 10th and 90th percentile."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"median": _short(median(ordered)), "p10": _short(at(0.1)), "p90": _short(at(0.9))}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def compare(
    contenders: Sequence[Contender], seconds: Mapping[str, Sequence[float]], ours: str = OURS
) -> dict[str, Any]:
    """Seconds of all, the fastest form of each family, and how many times slower than ours each other family is.

    A ratio is the other family's fastest form over our fastest form within each round: above 1, we are faster.
    """
    fastest: dict[str, str] = {}
    for contender in contenders:
        best = fastest.get(contender.family)
        if best is None or median(seconds[contender.name]) < median(seconds[best]):
            fastest[contender.family] = contender.name
    own = seconds[fastest[ours]]
    ratios = {
        family: spread([theirs / mine for theirs, mine in zip(seconds[name], own, strict=True)])
        for family, name in fastest.items()
        if family != ours
    }
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "fastest": fastest,
        "times_ours": ratios,
    }


def rates(seconds: Mapping[str, Sequence[float]], amount: float) -> dict[str, float]:
    """Units a second at the median of each contender."""
    return {name: round(amount / median(values), 1) for name, values in seconds.items()}

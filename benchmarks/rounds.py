"""The benchmark protocol: correctness checks, then interleaved rounds, then one JSON line.

Every contender runs once per round, in an order rotated from round to round, and ratios of times are taken *within* a
round, so that clock drift and other processes affect both sides alike. Standard library only, so that `--help` is
fast; torch is imported when measuring.
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
# Cores kept busy by other processes, before or after, above which the line is marked `noisy`.
NOISY_LOAD = 0.3
# Option -> advice for saving memory.
SMALLER = {
    "batch": "a smaller --batch",
    "peers": "fewer --peers",
    "alone": "--alone",
    "tokens": "fewer --tokens",
    "shape": "--shape demo",
}
PACKAGES = ("torch", "lightning", "transformers", "datasets", "numpy", "scipy", "torchmetrics", "litgpt", "t2i_lm")


class GateError(RuntimeError):
    """Implementations that must agree differ, so that comparing their times would be meaningless."""


@dataclass(frozen=True)
class Contender:
    """One implementation in one form.

    Attributes:
        name: of the form, in the report.
        family: implementation; the fastest of its forms (eager, compiled) counts.
        run: one repetition of the work.
        before: preparation of each repetition, not timed.
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
    arguments.add_argument("--no-compile", action="store_true", help="skip contenders with torch.compile")
    arguments.add_argument("--quick", action="store_true", help="smoke test: tiny sizes, not compiled, no result")
    return arguments


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def exit_code(measure: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Runs a benchmark; 1 if contenders disagree or cannot be built, 2 if a GPU is out of memory."""
    try:
        measure(options)
    except (GateError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from t2i_lm.runtime.devices import is_gpu_full

        if not is_gpu_full(error):
            raise
        advice = [text for key, text in SMALLER.items() if key in vars(options)]
        print(f"error: out of GPU memory; use {', '.join(advice)}", file=sys.stderr)
        return 2
    return 0


class Report:
    """The JSON line of a result; resolves `options.device` and the number of threads."""

    def __init__(self, benchmark: str, options: argparse.Namespace) -> None:
        self.benchmark, self.options = benchmark, options
        self.date = datetime.now(UTC).isoformat(timespec="seconds")
        self.pause = 0.1 if options.quick else 1.0
        self.load_before = load(self.pause)
        import torch

        if options.threads:
            torch.set_num_threads(options.threads)
        options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.threads = torch.get_num_threads()

    def write(self, **numbers: Any) -> None:
        """Prints the line, without paths, to be copied into RESULTS.md."""
        settings = {key: value for key, value in vars(self.options).items() if not isinstance(value, Path)}
        loads = [self.load_before, load(self.pause)]
        line = {
            "benchmark": self.benchmark,
            "date": self.date,
            "machine": _machine(self.options.device),
            "versions": _versions(),
            "threads": self.threads,
            "load": [round(each, 2) for each in loads],
            "noisy": max(loads) > NOISY_LOAD,
            "settings": settings,
            **numbers,
        }
        print(json.dumps(line), flush=True)


def load(seconds: float) -> float:
    """Cores that other processes keep busy, over a pause; where the system does not tell, its load average."""
    before, start = _busy_seconds(), time.perf_counter()
    if before is None:
        return os.getloadavg()[0]
    time.sleep(seconds)
    return ((_busy_seconds() or before) - before) / (time.perf_counter() - start)


def _busy_seconds() -> float | None:
    """Processor time of all processes, and what other virtual machines took, since the start of the system."""
    file = Path("/proc/stat")
    if not file.is_file():
        return None
    ticks = [int(word) for word in file.read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and waiting for a disk


def _machine(device: str) -> dict[str, Any]:
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    machine = {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }
    return machine | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def compiles(options: argparse.Namespace) -> bool:
    """Whether contenders with torch.compile take part."""
    from t2i_lm.runtime.devices import can_compile

    return not (options.no_compile or options.quick) and can_compile("torch.compile")


def gate(what: str, value: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest difference relative to the largest expected value.

    Raises:
        GateError: if it exceeds the tolerance or is NaN.
    """
    if value.shape != expected.shape:
        raise GateError(f"{what}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
    differ = (value.detach().double() - expected.detach().double()).abs().max()
    error = float(differ / expected.detach().double().abs().max().clamp(min=1e-30))
    if not error <= tolerance:  # also true for NaN
        raise GateError(f"{what} differs by {error:.2e} of the largest value, allowed is {tolerance:.0e}: not timed")
    return error


def seconds_of(run: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one repetition, synchronized on a GPU."""
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
    """Seconds of each contender in each round, after `warmup` untimed repetitions of each.

    `clock` is wall time by default; on one thread, `time.process_time` excludes other processes.
    """
    for contender in contenders:
        for _ in range(warmup):
            contender.before()
            contender.run()
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.disable()  # otherwise one contender's garbage is collected in another's time
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
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)

    def percentile(share: float) -> float:
        index = share * (len(ordered) - 1)
        low = int(index)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (index - low)

    return {"median": _rounded(median(ordered)), "p10": _rounded(percentile(0.1)), "p90": _rounded(percentile(0.9))}


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def compare(
    contenders: Sequence[Contender], seconds: Mapping[str, Sequence[float]], ours: str = OURS
) -> dict[str, Any]:
    """Seconds of all, the fastest form of each family, and each other family's time as a multiple of ours.

    A ratio is the other family's fastest form over our fastest form within each round; above 1, ours is faster.
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
    """Units/s at the median of each contender."""
    return {name: round(amount / median(values), 1) for name, values in seconds.items()}

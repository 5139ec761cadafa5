"""The Frechet term against scipy's matrix root and torchmetrics' own (goal G7).

Full-rank covariances in float64. On one thread, `--processor-time` excludes the load of other processes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.rounds import OURS, Contender, Report, compare, exit_code, gate, interleave, parser

if TYPE_CHECKING:
    from torch import Tensor

    Statistics = tuple[Tensor, Tensor, Tensor, Tensor]

EXAMPLE = "python -m benchmarks.fid --width 2048 --processor-time"
# Allowed relative difference from each peer's distance.
TOLERANCE = {"scipy": 1e-10, "torchmetrics": 1e-8}


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments."""
    arguments = parser("fid", "Frechet distance of two Gaussians, on the CPU.", EXAMPLE)
    arguments.add_argument("--width", type=int, default=2048, help="width of the features (default: %(default)s)")
    arguments.add_argument("--processor-time", action="store_true", help="measure CPU time instead of wall time")
    arguments.set_defaults(threads=1, device="cpu")
    return arguments.parse_args(argv)


def gaussians(width: int) -> Statistics:
    """Means and covariances of two sets of 2 x `width` features whose spectrum decays as 1/k, like Inception's."""
    import torch

    generator = torch.Generator().manual_seed(0)
    scale_D = torch.arange(1, width + 1, dtype=torch.float64).rsqrt()
    statistics = []
    for shift in (0.0, 0.1):
        rotation_DD = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        normal_ND = torch.randn(2 * width, width, generator=generator, dtype=torch.float64)
        features_ND = normal_ND * scale_D @ rotation_DD + shift
        statistics += [features_ND.mean(dim=0), features_ND.T.cov()]
    return statistics[0], statistics[1], statistics[2], statistics[3]


def scipy_root(mean1_D: Tensor, cov1_DD: Tensor, mean2_D: Tensor, cov2_DD: Tensor) -> Tensor:
    """The distance as in pytorch-fid and clean-fid."""
    import numpy as np
    import scipy.linalg

    root_DD = scipy.linalg.sqrtm((cov1_DD @ cov2_DD).numpy())
    between = (mean1_D - mean2_D).square().sum()
    return between + cov1_DD.trace() + cov2_DD.trace() - 2 * float(np.trace(np.real(root_DD)))


def implementations() -> dict[str, Callable[..., Tensor]]:
    """Each contender's distance of two means and covariances."""
    from torchmetrics.image.fid import _compute_fid

    from callbacks import frechet_distance

    return {OURS: frechet_distance, "scipy": scipy_root, "torchmetrics": _compute_fid}


def check(functions: dict[str, Callable[..., Tensor]], statistics: Statistics) -> dict[str, float]:
    """Our relative difference from each peer's value.

    Raises:
        GateError: if it exceeds the tolerance.
    """
    ours = functions[OURS](*statistics)
    return {
        peer: gate(f"{peer}: distance", ours, functions[peer](*statistics), limit) for peer, limit in TOLERANCE.items()
    }


def measure(options: argparse.Namespace) -> None:
    """Checks, times, reports.

    Raises:
        ValueError: on a GPU, which scipy does not support.
    """
    if options.device != "cpu":
        raise ValueError(f"--device {options.device}: expected cpu")
    report = Report("fid", options)
    statistics = gaussians(64 if options.quick else options.width)
    functions = implementations()
    errors = check(functions, statistics)  # also the first call of each
    contenders = [Contender(name, name, partial(function, *statistics)) for name, function in functions.items()]
    clock = time.process_time if options.processor_time else time.perf_counter
    seconds = interleave(contenders, options.rounds, warmup=0, device="cpu", clock=clock)
    report.write(gate=errors, **compare(contenders, seconds))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code."""
    return exit_code(measure, options(argv))


if __name__ == "__main__":
    sys.exit(main())

"""The Frechet term against scipy's root and torchmetrics' own (goal G7).

Full-rank covariances in float64. On one thread `--processor-time` leaves out what neighbors take.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.rounds import OURS, Contender, Report, answer, compare, gate, interleave, parser

if TYPE_CHECKING:
    from torch import Tensor

    Statistics = tuple[Tensor, Tensor, Tensor, Tensor]

EXAMPLE = "python -m benchmarks.fid --width 2048 --processor-time"
# How far ours may be from each peer's distance, relative to it.
TOLERANCE = {"scipy": 1e-10, "torchmetrics": 1e-8}


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    arguments = parser("fid", "Frechet distance of two Gaussians, on the CPU.", EXAMPLE)
    arguments.add_argument("--width", type=int, default=2048, help="of the features (default: %(default)s)")
    arguments.add_argument("--processor-time", action="store_true", help="time the processor and not the wall")
    arguments.set_defaults(threads=1, device="cpu")
    return arguments.parse_args(argv)


def gaussians(width: int) -> Statistics:
    """Means and covariances of two sets of 2 x `width` features whose spectrum decays as 1/k, as Inception's do."""
    import torch

    draw = torch.Generator().manual_seed(0)
    scale_D = torch.arange(1, width + 1, dtype=torch.float64).rsqrt()
    found = []
    for shift in (0.0, 0.1):
        turn_DD = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64)).Q
        features_ND = torch.randn(2 * width, width, generator=draw, dtype=torch.float64) * scale_D @ turn_DD + shift
        found += [features_ND.mean(dim=0), features_ND.T.cov()]
    return found[0], found[1], found[2], found[3]


def scipy_root(mean1_D: Tensor, cov1_DD: Tensor, mean2_D: Tensor, cov2_DD: Tensor) -> Tensor:
    """pytorch-fid's and clean-fid's way."""
    import numpy as np
    import scipy.linalg

    root_DD = scipy.linalg.sqrtm((cov1_DD @ cov2_DD).numpy())
    between = (mean1_D - mean2_D).square().sum()
    return between + cov1_DD.trace() + cov2_DD.trace() - 2 * float(np.trace(np.real(root_DD)))


def ways() -> dict[str, Callable[..., Tensor]]:
    """Every contender's distance of two means and covariances."""
    from torchmetrics.image.fid import _compute_fid

    from callbacks import frechet_distance

    return {OURS: frechet_distance, "scipy": scipy_root, "torchmetrics": _compute_fid}


def check(found: dict[str, Callable[..., Tensor]], given: Statistics) -> dict[str, float]:
    """Our relative distance from each peer's value.

    Raises:
        GateError: if it is above the tolerance.
    """
    ours = found[OURS](*given)
    return {peer: gate(f"{peer}: distance", ours, found[peer](*given), limit) for peer, limit in TOLERANCE.items()}


def measure(options: argparse.Namespace) -> None:
    """Compares, times, reports.

    Raises:
        ValueError: on a GPU, where scipy does not compute.
    """
    if options.device != "cpu":
        raise ValueError(f"--device {options.device}: expected cpu, where the distance is computed")
    report = Report("fid", options)
    given = gaussians(64 if options.quick else options.width)
    found = ways()
    agreed = check(found, given)  # also each one's first call
    contenders = [Contender(name, name, partial(way, *given)) for name, way in found.items()]
    clock = time.process_time if options.processor_time else time.perf_counter
    seconds = interleave(contenders, options.rounds, warmup=0, device="cpu", clock=clock)
    report.write(gate=agreed, **compare(contenders, seconds))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return answer(measure, options(argv))


if __name__ == "__main__":
    sys.exit(main())

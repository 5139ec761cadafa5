"""The Frechet term against scipy's root and torchmetrics' own: `python benchmarks/fid.py [--width 2048] [--rounds 3]`.

Full-rank covariances in float64, one thread, interleaved. Seconds are processor time, which on one thread leaves out
what neighbours take; the ratio is the median over rounds of peer time / our time within a round. Gate: all three agree
to 1e-10 (scipy) and 1e-8 (torchmetrics), else nothing is reported and the exit code is 1. Prints one JSON line.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import scipy
import scipy.linalg
import torch
import torchmetrics
from torch import Tensor
from torchmetrics.image.fid import _compute_fid

from callbacks import frechet_distance

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]


def gaussians(width: int) -> Statistics:
    """Means and covariances of two sets of 2 x `width` features whose spectrum decays as 1/k, as Inception's do."""
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
    root_DD = scipy.linalg.sqrtm((cov1_DD @ cov2_DD).numpy())
    between = (mean1_D - mean2_D).square().sum()
    return between + cov1_DD.trace() + cov2_DD.trace() - 2 * float(np.trace(np.real(root_DD)))


WAYS: dict[str, Callable[..., Tensor]] = {"ours": frechet_distance, "scipy": scipy_root, "torchmetrics": _compute_fid}
TOLERANCE = {"scipy": 1e-10, "torchmetrics": 1e-8}


def main() -> int:
    """Measures; returns the exit code."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--width", type=int, default=2048)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    given = gaussians(options.width)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    values: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            started = time.process_time()
            values[name] = float(way(*given))
            seconds[name].append(time.process_time() - started)
    errors = {name: abs(values[name] / values["ours"] - 1) for name in TOLERANCE}
    if any(errors[name] > limit for name, limit in TOLERANCE.items()):
        print(f"error: the distances differ: {values}", file=sys.stderr)
        return 1
    ratios = {
        name: statistics.median(peer / own for peer, own in zip(seconds[name], seconds["ours"], strict=True))
        for name in TOLERANCE
    }
    versions = {module.__name__: module.__version__ for module in (torch, scipy, torchmetrics)}
    line = {"benchmark": "frechet", "width": options.width, "threads": 1, "cpu_seconds": seconds, "ratio": ratios}
    print(json.dumps({**line, "relative_error": errors, "versions": versions}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Output projection and cross-entropy: fused in chunks against materialized logits (goals G4 and G6).

Forward and backward on random hidden states. Memory is the peak above the inputs, including their gradients; on a CPU
each variant is measured in a separate process.

Shapes: `N` targets, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rounds import OURS, Contender, GateError, Report, compare, compiles, exit_code, gate, interleave, parser

if TYPE_CHECKING:
    from torch import Tensor

    HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

EXAMPLE = "python -m benchmarks.head --width 256 --threads 2"
# Tolerances relative to the largest value, in float32: the loss by goal G4, gradients for their order of summation.
LOSS, GRADIENTS = 1e-6, 1e-4
# Our allowed error in bfloat16, as a multiple of that of materialized bfloat16 logits.
BF16_ERROR = 2.0
CHUNK = 256  # targets of torch's own chunked loss; its default is slow at small widths
MIB = 2**20


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments."""
    arguments = parser("head", "Output projection and cross-entropy, time and peak memory.", EXAMPLE)
    arguments.add_argument("--tokens", type=int, default=2304, help="targets (default: %(default)s, two sequences)")
    arguments.add_argument("--vocab", type=int, default=66_823, help="rows (default: %(default)s, the paper's)")
    arguments.add_argument("--width", type=int, help="default: 2048, the paper's, on a GPU; 256 on a CPU")
    arguments.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="default: %(default)s")
    arguments.add_argument("--peak-of", metavar="VARIANT", help=argparse.SUPPRESS)  # for child processes
    return arguments.parse_args(argv)


def fused(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Ours."""
    from t2i_lm.models.cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x_ND, weight_VD, target_N).total / len(target_N)


def whole(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Common training code: all logits, in float32."""
    import torch.nn.functional as F

    return F.cross_entropy(F.linear(x_ND, weight_VD).float(), target_N)


def torch_chunked(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Torch's chunked loss (newer releases) in its faster form: the mean alone."""
    import torch.nn.functional as F
    from torch.nn import LinearCrossEntropyOptions

    chunks = LinearCrossEntropyOptions(batch_chunk_size=min(CHUNK, len(target_N)))
    return F.linear_cross_entropy(x_ND, weight_VD, target_N, options=chunks)


def torch_single(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Torch's chunked loss as in `loss.backend=torch`: loss and logsumexp of each target."""
    from t2i_lm.models.cross_entropy import torch_linear_cross_entropy

    return torch_linear_cross_entropy(x_ND, weight_VD, target_N).total / len(target_N)


def variants(precision: str, compiled: bool) -> dict[str, tuple[str, HeadLoss]]:
    """Name -> (family, loss); torch's own only in float32, since they ignore autocast."""
    import torch

    losses: dict[str, tuple[str, HeadLoss]] = {f"{OURS} fused": (OURS, fused), "whole logits eager": ("whole", whole)}
    if precision == "fp32" and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        losses["torch chunked"] = ("torch chunked", torch_chunked)
        losses["loss.backend=torch"] = ("loss.backend=torch", torch_single)
    if compiled:
        losses["whole logits compiled"] = ("whole", torch.compile(whole))
    return losses


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states of a normalized layer, rows with open_lm's initial scale, targets; from a fixed seed."""
    import torch

    generator = torch.Generator(options.device).manual_seed(0)
    x_ND = torch.empty(options.tokens, options.width, device=options.device).normal_(generator=generator)
    weight_VD = torch.empty(options.vocab, options.width, device=options.device)
    weight_VD.normal_(std=options.width**-0.5, generator=generator)
    target_N = torch.randint(options.vocab, (options.tokens,), generator=generator, device=options.device)
    return x_ND.requires_grad_(), weight_VD.requires_grad_(), target_N


def differentiate(
    loss: HeadLoss, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by x and weight."""
    import torch

    with torch.autocast(x_ND.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        value = loss(x_ND, weight_VD, target_N)
    grad_x_ND, grad_weight_VD = torch.autograd.grad(value, (x_ND, weight_VD))
    return value.detach(), grad_x_ND, grad_weight_VD


def check(losses: dict[str, tuple[str, HeadLoss]], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Errors of every variant's value and gradients against materialized logits in float32.

    In bfloat16 the tolerance follows the rounding error of eager materialized logits.

    Raises:
        GateError: naming the difference.
    """
    tensors = inputs(options)
    expected = differentiate(whole, *tensors, "fp32")
    parts = ("loss", "gradient of x", "gradient of weight")
    errors: dict[str, dict[str, float]] = {}

    def compare_all(name: str, loss: HeadLoss, precision: str, allowed: Sequence[float]) -> dict[str, float]:
        values = differentiate(loss, *tensors, precision)
        return {
            part: gate(f"{name}: {part} in {precision}", value, reference, limit)
            for part, value, reference, limit in zip(parts, values, expected, allowed, strict=True)
        }

    for name, (_, loss) in losses.items():
        errors[name] = compare_all(name, loss, "fp32", (LOSS, GRADIENTS, GRADIENTS))
    if options.precision == "bf16":
        rounding = compare_all("whole logits eager", whole, "bf16", (0.05,) * len(parts))
        allowed = [max(LOSS, BF16_ERROR * rounding[part]) for part in parts]
        for name, (_, loss) in losses.items():
            errors[f"{name}, bf16"] = compare_all(name, loss, "bf16", allowed)
    return errors


def peak_of(options: argparse.Namespace, loss: HeadLoss) -> float:
    """Peak MiB above the inputs of one forward and backward; on a CPU that of the process, so call it once."""
    import torch

    tensors = inputs(options)
    # A small problem first loads the libraries' own buffers and code.
    few = [tensor.detach()[:64].requires_grad_() for tensor in tensors[:2]]
    differentiate(loss, few[0], few[1], tensors[2][:64] % 64, options.precision)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        differentiate(loss, *tensors, options.precision)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    before = _peak_bytes()
    differentiate(loss, *tensors, options.precision)
    return (_peak_bytes() - before) / MIB


def _peak_bytes() -> int:
    """Peak resident size of the process, or since Linux last reset it."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peaks(names: Sequence[str], options: argparse.Namespace, losses: dict[str, Any]) -> dict[str, float]:
    """Peak MiB of each variant: on a GPU in this process, on a CPU in a child process each."""
    if options.device == "cuda":
        return {name: round(peak_of(options, losses[name][1]), 1) for name in names}
    peak_mib = {}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.head", "--peak-of", name, "--device", options.device]
        for key in ("tokens", "vocab", "width", "precision", "threads"):
            if (value := getattr(options, key)) is not None:
                command += [f"--{key}", str(value)]
        command += [] if compiles(options) else ["--no-compile"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if done.returncode:
            raise ValueError(f"cannot measure the memory of {name}: {done.stderr.strip()}")
        peak_mib[name] = round(float(json.loads(done.stdout.splitlines()[-1])), 1)
    return peak_mib


def measure(options: argparse.Namespace) -> None:
    """Checks, times, measures memory, reports."""
    report = Report("head", options)
    if options.quick:
        options.tokens, options.vocab, options.width = 128, 20_000, 32
    options.width = options.width or (2048 if options.device == "cuda" else 256)
    losses = variants(options.precision, compiles(options))
    if options.peak_of is not None:
        print(peak_of(options, losses[options.peak_of][1]))
        return
    agreement = check(losses, options)
    tensors = inputs(options)
    contenders = [
        Contender(name, family, partial(differentiate, loss, *tensors, options.precision))
        for name, (family, loss) in losses.items()
    ]
    seconds = interleave(contenders, options.rounds, 1 if options.quick else 2, options.device)
    # On a CPU, without compiled variants: the compiler's own memory would count.
    names = [name for name in losses if options.device == "cuda" or "compiled" not in name]
    peak_mib = peaks(names[:1] if options.quick else names, options, losses)
    own = peak_mib[f"{OURS} fused"]
    if own <= 0:
        raise GateError("the fused head used no memory: the measurement is broken")
    report.write(
        gate=agreement,
        **compare(contenders, seconds),
        peak_mib=peak_mib,
        gradients_mib=round((options.tokens + options.vocab) * options.width * 4 / MIB, 1),
        peak_times_ours={name: round(peak / own, 2) for name, peak in peak_mib.items()},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code."""
    return exit_code(measure, options(argv))


if __name__ == "__main__":
    sys.exit(main())

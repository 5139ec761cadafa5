"""The loss's Triton kernel on a CPU, by Triton's interpreter, against torch's operations: prints the largest errors.

A process of its own, since Triton reads TRITON_INTERPRET when it is imported: `TRITON_INTERPRET=1 python -m
tests.models.interpreted_kernel`.
"""

import itertools
import json

import torch
from torch import Tensor

import t2i_lm.models.chunk_loss as chunks
import t2i_lm.models.chunk_loss_kernel as kernel
import t2i_lm.models.cross_entropy as losses
import t2i_lm.models.padded_rows as padded_rows

CPU = torch.device("cpu")


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference relative to that of the expected values."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def chunk(classes: int, columns: int, dtype: torch.dtype, z_loss: float) -> dict[str, float]:
    """Errors of one chunk's losses and gradient; pads hold what a product with rows of zeros leaves."""
    generator = torch.Generator().manual_seed(0)
    logits_CP = (8 * torch.randn(5, columns, generator=generator)).to(dtype)
    logits_CP[:, classes:] = 0
    target_C = torch.tensor([0, classes - 1, 3, classes - 1, 17])
    theirs_CP, kept_CP = logits_CP.clone(), logits_CP.clone()
    expected = chunks.chunk_loss(CPU, theirs_CP, classes, z_loss)(theirs_CP, target_C, True)
    without = kernel.one_pass(kept_CP, target_C, classes, z_loss, False)
    assert torch.equal(kept_CP, logits_CP), "without a gradient the logits stay"
    found = kernel.one_pass(logits_CP, target_C, classes, z_loss, True)
    assert all(map(torch.equal, found, without))
    assert not logits_CP[:, classes:].any()
    names = ("nll", "lse", "gradient")
    pairs = zip(names, (*found, logits_CP), (*expected, theirs_CP), strict=True)
    return {name: error(own, other) for name, own, other in pairs}


def whole(z_loss: float) -> dict[str, float]:
    """Errors of the loss and its gradients with padded rows and the kernel, against neither."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(50, 24, generator=generator).requires_grad_()
    blocks = [torch.randn(rows, 24, generator=generator).requires_grad_() for rows in (61, 7, 33)]
    target_N = torch.randint(101, (50,), generator=generator)
    weight_N = torch.rand(50, generator=generator)

    def values() -> list[Tensor]:
        loss = losses.linear_cross_entropy(x_ND, blocks, target_N, weight_N, z_loss)
        return [loss.total, loss.nll_N, loss.lse_N, *torch.autograd.grad(loss.total, (x_ND, *blocks))]

    expected = values()
    padded_rows.DEVICES.add("cpu")
    chunks.single_pass = lambda device: kernel.one_pass  # type: ignore[assignment]
    found = values()
    padded_rows.DEVICES.discard("cpu")
    names = ("total", "nll", "lse", "x", "text", "special", "image")
    return {name: error(own, other) for name, own, other in zip(names, found, expected, strict=True)}


if __name__ == "__main__":
    kernel.BLOCK = 64  # several blocks, the last one of pads alone in one case
    worst = {"float32": 0.0, "bfloat16": 0.0, "whole": 0.0}
    # Bfloat16 too is compared with torch's: the interpreter cuts a float32's last bits off, where a GPU rounds.
    for (classes, columns), dtype, z_loss in itertools.product(
        ((90, 128), (64, 64), (127, 192)), (torch.float32, torch.bfloat16), (0.0, 1e-2)
    ):
        name = str(dtype).removeprefix("torch.")
        worst[name] = max(worst[name], *chunk(classes, columns, dtype, z_loss).values())
    losses.CPU_LOGITS, losses.TARGETS = 1, 7
    worst["whole"] = max(max(whole(z_loss).values()) for z_loss in (0.0, 1e-2))
    print(json.dumps(worst))

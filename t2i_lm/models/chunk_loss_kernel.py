"""Triton kernel of `chunk_loss.py`: a row of logits is read from memory once and overwritten once.

The second reading, which computes the gradient, finds the row in the cache: the rows in flight are 134 kB each.
Imported only where it is used, since Triton comes with torch on Linux with CUDA alone.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # columns at a time: 16 per thread
WARPS = 16


@triton.jit  # type: ignore[untyped-decorator]
def _row(  # type: ignore[no-untyped-def]
    logits,
    target_of,
    nll_of,
    lse_of,
    stride,
    classes,
    columns,
    z_loss,
    DIFFERENTIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(target_of + row)
    own = tl.load(logits + target).to(tl.float32)  # before anything is overwritten: the sums below synchronize
    lane = tl.arange(0, BLOCK)
    highest = -float("inf")
    total = 0.0
    for start in range(0, classes, BLOCK):
        column = start + lane
        # Masked by the columns, a multiple of 16: a mask of odd length would forbid reading 16 bytes at a time.
        value = tl.load(logits + column, mask=column < columns, other=0.0).to(tl.float32)
        value = tl.where(column < classes, value, -float("inf"))
        higher = tl.maximum(highest, tl.max(value, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(value - higher), 0)
        highest = higher
    log_sum = tl.log(total)
    lse = highest + log_sum
    tl.store(nll_of + row, (highest - own) + log_sum)
    tl.store(lse_of + row, lse)
    if DIFFERENTIATE:
        growth = 1 + 2 * z_loss * lse
        for start in range(0, columns, BLOCK):
            column = start + lane
            value = tl.load(logits + column, mask=column < columns, other=0.0).to(tl.float32)
            value = tl.where(column < classes, value, -float("inf"))
            gradient = tl.exp(value - highest) / total * growth
            gradient = tl.where(column == target, gradient - 1, gradient)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < columns)


def one_pass(
    logits_CP: Tensor, target_C: Tensor, classes: int, z_loss: float, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """Losses `nll` and `lse` (C,), float32; `differentiate` replaces the logits by their gradient."""
    count, columns = logits_CP.shape
    nll_C = torch.empty(count, dtype=torch.float32, device=logits_CP.device)
    lse_C = torch.empty_like(nll_C)
    block = min(BLOCK, triton.next_power_of_2(columns))
    if not count:
        return nll_C, lse_C
    with torch.cuda.device(logits_CP.device) if logits_CP.is_cuda else nullcontext():
        _row[(count,)](
            logits_CP,
            target_C,
            nll_C,
            lse_C,
            logits_CP.stride(0),
            classes,
            columns,
            float(z_loss),
            DIFFERENTIATE=differentiate,
            BLOCK=block,
            num_warps=WARPS if block == BLOCK else 4,
            enable_fp_fusion=True,  # explicit, since a newer Triton warns of its changing default
        )
    return nll_C, lse_C

"""Row counts that a GPU multiplies fast.

A product whose contiguous dimension is odd falls to cuBLAS kernels that read one 16-bit value at a time: on an H100 the
three products of the paper's 66,823 output rows took 110 of a step's 375 ms, those of 66,880 rows 18.

Shapes: `V` rows, `P` rows with pads, `D` width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Of rows: 128 bytes of a 16-bit number format.
MULTIPLE = 64
# Types of devices whose products are padded. A CPU's gain nothing.
DEVICES = {"cuda"}


def padded_count(rows: int, device: torch.device) -> int:
    """P for V rows: the number to multiply by, of which the last P - V are zeros."""
    return -(-rows // MULTIPLE) * MULTIPLE if device.type in DEVICES else rows


def join_rows(blocks: Sequence[Tensor], rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """Blocks below each other (P, D) with zeros up to `rows`, without gradient; a single block of that size as it is.

    Joins, converts and pads in one pass over memory. A matrix of several blocks or in another dtype is copied in any
    case, so that its pads cost no pass of their own.
    """
    dtype = dtype or common_dtype(blocks)
    if len(blocks) == 1 and len(blocks[0]) == rows:
        return blocks[0].detach().to(dtype)
    joined_PD = blocks[0].new_empty(rows, blocks[0].shape[1], dtype=dtype)
    start = 0
    for block in blocks:
        joined_PD[start : start + len(block)].copy_(block.detach())
        start += len(block)
    joined_PD[start:].zero_()
    return joined_PD


def common_dtype(blocks: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds the values of all blocks."""
    dtype = blocks[0].dtype
    for block in blocks[1:]:
        dtype = torch.promote_types(dtype, block.dtype)
    return dtype


def pad_blocks(blocks: Sequence[Tensor]) -> list[Tensor]:
    """The blocks, and one of zeros if their rows are not aligned; for a differentiable `torch.cat`."""
    rows = sum(map(len, blocks))
    pads = padded_count(rows, blocks[0].device) - rows
    return [*blocks, blocks[0].new_zeros(pads, blocks[0].shape[1])] if pads else list(blocks)

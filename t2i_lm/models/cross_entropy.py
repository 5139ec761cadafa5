"""Cross-entropy fused with the output projection, in chunks.

Shapes: `N` targets, `D` width, `V` vocabulary, `P` with pads; `C` targets of one chunk, `X` of the largest.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_lm.models.chunk_loss import chunk_loss
from t2i_lm.models.padded_rows import common_dtype, join_rows, padded_count

# Elements of logits per chunk: few enough for a CPU's cache, enough to keep a GPU busy.
# On an H100 2,048 targets of the paper's rows: 128 tiles of the gradient by hidden states for 132 multiprocessors.
CPU_LOGITS, GPU_LOGITS = 2**21, 2048 * 66_880
# Minimum targets per chunk: with fewer, reading the rows costs more than multiplying by them.
TARGETS = 256
TILE = 128  # rows of a CUDA kernel's tile
ROWS = 1024  # per matmul on a CPU, where a float32 product with all rows can take 1.6 times as long


class TokenLoss(NamedTuple):
    """The loss to differentiate, and its terms.

    Attributes:
        total: weighted sum of nll and z-loss, nats, 0-d with gradient.
        nll_N: negative log-likelihood of each target, nats, float32, without gradient.
        lse_N: logsumexp of each target's logits, float32, without gradient.
    """

    total: Tensor
    nll_N: Tensor
    lse_N: Tensor


# A function with the signature of `linear_cross_entropy`; `z_loss` may be bound.
LossBackend = Callable[..., TokenLoss]


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor | Sequence[Tensor],
    target_N: Tensor,
    token_weight_N: Tensor | None = None,
    z_loss: float = 0.0,
) -> TokenLoss:
    """Cross-entropy of `x_ND @ weight_VD.T` without materializing the logits.

    Computes the gradient of each chunk of targets in the forward pass, while its logits exist, so memory does not
    grow with N x V and nothing is computed twice. Under autocast the products have its dtype; logsumexp, losses and
    the sum of the weight's gradient are float32. On CUDA the rows are padded (`padded_rows.py`), which changes no
    value.

    Args:
        x_ND: hidden states.
        weight_VD: output rows, or blocks of them in order.
        target_N: int64 in [0, V).
        token_weight_N: factor of each target in `total`; ones by default.
        z_loss: factor of lse squared in each target's term of `total`; never in `nll_N`.
    """
    blocks = [weight_VD] if isinstance(weight_VD, Tensor) else list(weight_VD)
    device = x_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else common_dtype(blocks)
    if token_weight_N is None:
        token_weight_N = torch.ones_like(target_N, dtype=torch.float32)
    if not torch.is_grad_enabled():  # it is always off inside a Function's forward
        x_ND, blocks = x_ND.detach(), [block.detach() for block in blocks]
    values = _LinearCrossEntropy.apply(x_ND.to(dtype), target_N, token_weight_N, z_loss, *blocks)
    return TokenLoss(*values)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, target_N: Tensor, token_weight_N: Tensor, z_loss: float, *blocks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_grad, block_grads = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        rows = sum(map(len, blocks))
        # Converted here, so that autograd does not round the weight's gradient.
        weight_PD = join_rows(blocks, padded_count(rows, x_ND.device), x_ND.dtype)
        chunk = chunk_size(len(x_ND), len(weight_PD), x_ND.device)
        # Reused by all chunks: allocating this much costs a CPU as much time as the exponentials.
        logits_XP = x_ND.new_empty(chunk, len(weight_PD))
        differentiate = chunk_loss(x_ND.device, logits_XP, rows, z_loss)
        nll_N = torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device)
        lse_N = torch.empty_like(nll_N)
        grad_x_ND = torch.empty_like(x_ND) if x_grad else None
        grad_weight_PD = torch.zeros_like(weight_PD, dtype=torch.float32) if any(block_grads) else None
        needed = x_grad or grad_weight_PD is not None
        with torch.autocast(x_ND.device.type, enabled=False):
            for start in range(0, len(x_ND), chunk):
                part = slice(start, start + chunk)
                x_CD = x_ND[part]
                logits_CP = logits_XP[: len(x_CD)]
                _multiply(x_CD, weight_PD, logits_CP)
                nll_N[part], lse_N[part] = differentiate(logits_CP, target_N[part], needed)
                if not needed:
                    continue
                # d total / d logits = weight * (growth * p - onehot), the weight applied to (C, D) instead of (C, V).
                grad_CP, factor_C1 = logits_CP, token_weight_N[part, None]
                scaled_CD = (x_CD * factor_C1).to(x_CD.dtype)
                if grad_x_ND is not None:
                    grad_x_ND[part] = (grad_CP @ weight_PD) * factor_C1
                if grad_weight_PD is not None:
                    _accumulate(grad_weight_PD, grad_CP.T, scaled_CD)
        ctx.sizes = [len(block) if needs else None for block, needs in zip(blocks, block_grads, strict=True)]
        ctx.starts = [sum(map(len, blocks[:number])) for number in range(len(blocks))]
        ctx.save_for_backward(grad_x_ND, grad_weight_PD)
        ctx.mark_non_differentiable(nll_N, lse_N)
        total = (token_weight_N * (nll_N + z_loss * lse_N.square())).sum()
        return total, nll_N, lse_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_ND, grad_weight_PD = ctx.saved_tensors
        if grad_weight_PD is not None:
            grad_weight_PD.mul_(grad)  # in place: the largest tensor of all
        grad_blocks = [
            None if size is None else grad_weight_PD[start : start + size]
            for start, size in zip(ctx.starts, ctx.sizes, strict=True)
        ]
        grad_x_ND = None if grad_x_ND is None else grad_x_ND * grad.to(grad_x_ND.dtype)
        return grad_x_ND, None, None, None, *grad_blocks


def chunk_size(targets: int, rows: int, device: torch.device) -> int:
    """Targets per chunk: at least 1, on CUDA of equal number and a multiple of a kernel's tile."""
    most = max(TARGETS, (GPU_LOGITS if device.type == "cuda" else CPU_LOGITS) // rows)
    if device.type == "cuda" and targets > most:
        each = -(-targets // -(-targets // most))  # a last chunk of a few targets would read all rows for them
        most = -(-each // TILE) * TILE
    return max(1, min(most, targets))


def _multiply(x_CD: Tensor, weight_PD: Tensor, out_CP: Tensor) -> None:
    """Writes the logits of a chunk into `out_CP`."""
    rows = ROWS if x_CD.is_cpu else len(weight_PD)
    for start in range(0, len(weight_PD), rows):
        some = slice(start, start + rows)
        torch.mm(x_CD, weight_PD[some].T, out=out_CP[:, some])


def _accumulate(total_PD: Tensor, grad_PC: Tensor, x_CD: Tensor) -> None:
    """Adds a product to a float32 sum, inside the product where torch can."""
    if grad_PC.dtype == torch.float32:
        total_PD.addmm_(grad_PC, x_CD)
    elif sums_in_float32(grad_PC.device, grad_PC.dtype):
        torch.addmm(total_PD, grad_PC, x_CD, out_dtype=torch.float32, out=total_PD)
    else:
        total_PD += grad_PC @ x_CD


@cache
def sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of 16-bit matrices can be added to a float32 matrix on a device, without rounding it first."""
    if device.type != "cuda":
        return False
    ones_TT, total_TT = torch.ones(TILE, TILE, dtype=dtype, device=device), torch.ones(TILE, TILE, device=device)
    try:
        torch.addmm(total_TT, ones_TT.T, ones_TT, out_dtype=torch.float32, out=total_TT)
    except (RuntimeError, TypeError):  # an older torch
        return False
    return bool((total_TT == TILE + 1).all())


def torch_linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor | Sequence[Tensor],
    target_N: Tensor,
    token_weight_N: Tensor | None = None,
    z_loss: float = 0.0,
) -> TokenLoss:
    """As `linear_cross_entropy`, by torch's own chunked loss, in float32 even under autocast, without pads.

    In bfloat16 torch would return losses rounded to bfloat16. Rows of zeros would count as classes.
    """
    if not isinstance(weight_VD, Tensor):
        weight_VD = torch.cat(list(weight_VD)) if len(weight_VD) > 1 else weight_VD[0]
    x_ND, weight_VD = x_ND.float(), weight_VD.float()
    with torch.autocast(x_ND.device.type, enabled=False):
        chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(1, min(TARGETS, len(x_ND))))
        nll_N = F.linear_cross_entropy(x_ND, weight_VD, target_N, reduction="none", options=chunks)
        with torch.set_grad_enabled(torch.is_grad_enabled() and z_loss > 0):
            lse_N = nll_N + (x_ND * weight_VD[target_N]).sum(1)  # the loss plus the target's logit
        loss_N = nll_N + z_loss * lse_N.square() if z_loss else nll_N
        total = (loss_N if token_weight_N is None else token_weight_N * loss_N).sum()
    return TokenLoss(total, nll_N.detach(), lse_N.detach())


# By `loss.backend`.
BACKENDS: dict[str, LossBackend] = {
    "fused": linear_cross_entropy,
    "torch": torch_linear_cross_entropy,
}


def loss_backend(name: str) -> LossBackend:
    """The implementation of a `loss.backend`.

    Raises:
        ValueError: if the installed torch lacks it.
    """
    if name == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ValueError(f"loss.backend=torch: torch {torch.__version__} has no chunked loss; use loss.backend=fused")
    return BACKENDS[name]

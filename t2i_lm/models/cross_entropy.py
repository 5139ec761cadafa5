"""Cross-entropy fused with the output projection, in chunks.

Shapes: `N` targets, `D` width, `V` vocabulary, `M` classes; `C` targets of one chunk, `X` of the largest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of logits per chunk: few enough for a CPU's cache, enough to keep a GPU busy.
CPU_LOGITS, GPU_LOGITS = 2**21, 2**27
# Minimum targets per chunk: with fewer, reading the rows costs more than multiplying by them.
TARGETS = 256
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
    x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, token_weight_N: Tensor | None = None, z_loss: float = 0.0
) -> TokenLoss:
    """Cross-entropy of `x_ND @ weight_VD.T` without materializing the logits.

    Computes the gradient of each chunk of targets in the forward pass, while its logits exist, so memory does not
    grow with N x V and nothing is computed twice. Under autocast the products have its dtype; logsumexp, losses and
    the sum of the weight's gradient are float32.

    Args:
        x_ND: hidden states.
        weight_VD: output rows.
        target_N: int64 in [0, V).
        token_weight_N: factor of each target in `total`; ones by default.
        z_loss: factor of lse squared in each target's term of `total`; never in `nll_N`.
    """
    device = x_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    if token_weight_N is None:
        token_weight_N = torch.ones_like(target_N, dtype=torch.float32)
    if not torch.is_grad_enabled():  # it is always off inside a Function's forward
        x_ND, weight_VD = x_ND.detach(), weight_VD.detach()
    values = _LinearCrossEntropy.apply(x_ND.to(dtype), weight_VD, target_N, token_weight_N, z_loss)
    return TokenLoss(*values)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, token_weight_N: Tensor, z_loss: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_grad, weight_grad = ctx.needs_input_grad[:2]
        weight_VD = weight_VD.to(x_ND.dtype)  # here, so that autograd does not round the weight's gradient
        chunk = max(TARGETS, (GPU_LOGITS if x_ND.is_cuda else CPU_LOGITS) // len(weight_VD))
        chunk = max(1, min(chunk, len(x_ND)))
        # Reused by all chunks: allocating this much costs a CPU as much time as the exponentials.
        logits_XV = x_ND.new_empty(chunk, len(weight_VD))
        converts = logits_XV.dtype != torch.float32
        prob_XV = torch.empty_like(logits_XV, dtype=torch.float32) if converts else logits_XV
        minus_one_X1 = prob_XV.new_full((chunk, 1), -1.0)
        nll_N = torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device)
        lse_N = torch.empty_like(nll_N)
        grad_x_ND = torch.empty_like(x_ND) if x_grad else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if weight_grad else None
        with torch.autocast(x_ND.device.type, enabled=False):
            for start in range(0, len(x_ND), chunk):
                part = slice(start, start + chunk)
                x_CD, target_C1 = x_ND[part], target_N[part, None]
                logits_CV, prob_CV = logits_XV[: len(x_CD)], prob_XV[: len(x_CD)]
                _multiply(x_CD, weight_VD, logits_CV)
                if converts:  # torch's softmax would allocate for it
                    prob_CV.copy_(logits_CV)
                highest_C1 = prob_CV.amax(1, keepdim=True)
                below_C1 = highest_C1 - prob_CV.gather(1, target_C1)
                torch.softmax(prob_CV, dim=1, out=prob_CV)
                # The highest probability is the inverse of the softmax's denominator.
                log_sum_C1 = prob_CV.amax(1, keepdim=True).log_().neg_()
                lse_C1 = highest_C1 + log_sum_C1
                nll_N[part], lse_N[part] = (below_C1 + log_sum_C1).squeeze(1), lse_C1.squeeze(1)
                if not (x_grad or weight_grad):
                    continue
                # d total / d logits = weight * (growth * p - onehot), the weight applied to (C, D) instead of (C, V).
                # Float32 until the cast: bfloat16 would round a growth of 1.002 to 1.
                grad_CV = prob_CV
                if z_loss:
                    grad_CV *= 1 + 2 * z_loss * lse_C1
                grad_CV.scatter_add_(1, target_C1, minus_one_X1[: len(x_CD)])
                factor_C1 = token_weight_N[part, None]
                scaled_CD = (x_CD * factor_C1).to(x_CD.dtype)
                if converts:
                    grad_CV = logits_CV.copy_(grad_CV)
                if grad_x_ND is not None:
                    grad_x_ND[part] = (grad_CV @ weight_VD) * factor_C1
                if grad_weight_VD is not None and converts:
                    grad_weight_VD += grad_CV.T @ scaled_CD
                elif grad_weight_VD is not None:
                    grad_weight_VD.addmm_(grad_CV.T, scaled_CD)
        ctx.save_for_backward(grad_x_ND, grad_weight_VD)
        ctx.mark_non_differentiable(nll_N, lse_N)
        total = (token_weight_N * (nll_N + z_loss * lse_N.square())).sum()
        return total, nll_N, lse_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_x_ND, grad_weight_VD = ctx.saved_tensors
        return (
            None if grad_x_ND is None else grad_x_ND * grad.to(grad_x_ND.dtype),
            None if grad_weight_VD is None else grad_weight_VD.mul_(grad),  # in place: the largest tensor of all
            None,
            None,
            None,
        )


def _multiply(x_CD: Tensor, weight_VD: Tensor, out_CV: Tensor) -> None:
    """Writes the logits of a chunk into `out_CV`."""
    rows = ROWS if x_CD.is_cpu else len(weight_VD)
    for start in range(0, len(weight_VD), rows):
        some = slice(start, start + rows)
        torch.mm(x_CD, weight_VD[some].T, out=out_CV[:, some])


def torch_linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, token_weight_N: Tensor | None = None, z_loss: float = 0.0
) -> TokenLoss:
    """As `linear_cross_entropy`, by torch's own chunked loss, in float32 even under autocast.

    In bfloat16 torch would return losses rounded to bfloat16.
    """
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

"""Losses of one chunk of logits and their gradient, by one kernel where Triton is, else by torch's operations.

Shapes: `C` targets of the chunk, `V` classes, `P` columns: V classes, then pads.
"""

import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# (logits (C, P), targets (C,), whether to differentiate) -> nll (C,), lse (C,), both float32. Differentiating replaces
# the logits by the gradient of nll + z_loss * lse^2, which is 0 in pads.
ChunkLoss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def chunk_loss(device: torch.device, logits_XP: Tensor, classes: int, z_loss: float) -> ChunkLoss:
    """The implementation for a device.

    Args:
        device: of the logits.
        logits_XP: the memory of the largest chunk, whose first rows later chunks use.
        classes: V.
        z_loss: factor of lse squared.
    """
    kernel = single_pass(device)
    if kernel is not None:
        return lambda logits_CP, target_C, differentiate: kernel(logits_CP, target_C, classes, z_loss, differentiate)
    converts = logits_XP.dtype != torch.float32
    float_XP = torch.empty_like(logits_XP, dtype=torch.float32) if converts else logits_XP
    minus_one_X1 = float_XP.new_full((len(logits_XP), 1), -1.0)

    def by_operations(logits_CP: Tensor, target_C: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
        target_C1, prob_CP = target_C[:, None], float_XP[: len(logits_CP)]
        if converts:  # torch's softmax would allocate for it
            prob_CP.copy_(logits_CP)
        if prob_CP.shape[1] > classes:
            prob_CP[:, classes:] = float("-inf")
        highest_C1 = prob_CP.amax(1, keepdim=True)
        below_C1 = highest_C1 - prob_CP.gather(1, target_C1)
        torch.softmax(prob_CP, dim=1, out=prob_CP)
        # The highest probability is the inverse of the softmax's denominator.
        log_sum_C1 = prob_CP.amax(1, keepdim=True).log_().neg_()
        lse_C1 = highest_C1 + log_sum_C1
        if differentiate:
            # Float32 until the cast: bfloat16 would round a growth of 1.002 to 1.
            if z_loss:
                prob_CP *= 1 + 2 * z_loss * lse_C1
            prob_CP.scatter_add_(1, target_C1, minus_one_X1[: len(logits_CP)])
            if converts:
                logits_CP.copy_(prob_CP)
        return (below_C1 + log_sum_C1).squeeze(1), lse_C1.squeeze(1)

    return by_operations


@cache
def single_pass(device: torch.device) -> Callable[[Tensor, Tensor, int, float, bool], tuple[Tensor, Tensor]] | None:
    """The Triton kernel on a CUDA device; elsewhere None, on CUDA with one line that says why."""
    if device.type != "cuda":
        return None
    try:
        from t2i_lm.models.chunk_loss_kernel import one_pass

        logits_CP = torch.zeros(2, 64, device=device, dtype=torch.bfloat16)
        nll_C, _ = one_pass(logits_CP, torch.zeros(2, dtype=torch.int64, device=device), 50, 0.0, True)
        works = bool(((nll_C - 3.912).abs() < 1e-3).all())  # log 50
        cause = "wrong values"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton raises many kinds: no package, no C compiler, a GPU that it does not know
        works, cause = False, f"{type(error).__name__}: {error}".splitlines()[0]
    if not works:
        print(f"loss: no Triton kernel ({cause}); several passes over the logits instead (slower)", file=sys.stderr)
        return None
    return one_pass

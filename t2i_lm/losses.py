"""Sums and counts of the negative log-likelihood, per modality; never means of means (Figure 4)."""

import torch
from torch import Tensor


def split_sums(nll_N: Tensor, class_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum and count of `nll_N` in each class.

    Args:
        nll_N: negative log-likelihood of each target, nats.
        class_N: class of each target, int64 in [0, classes).
        classes: number of classes M.

    Returns:
        (nll_sum_M float64, count_M int64), detached and on the inputs' device. float64 so that the
        sums of a whole validation set do not depend on its order within printed precision.
    """
    nll_N = nll_N.detach().double()
    nll_sum_M = torch.zeros(classes, dtype=torch.float64, device=nll_N.device)
    count_M = torch.zeros(classes, dtype=torch.int64, device=nll_N.device)
    nll_sum_M.index_add_(0, class_N, nll_N)
    count_M.index_add_(0, class_N, torch.ones_like(class_N))
    return nll_sum_M, count_M

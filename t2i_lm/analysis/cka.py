"""Centered kernel alignment of representations, linear and debiased (Kornblith et al., 2019; Song et al., 2012).

Shapes: `N` examples, `D`, `E` features, `G` groups of examples.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A value with its standard error, and the number of units that the error is over."""

    value: float
    se: float
    n: int


class _Moments(NamedTuple):
    """Sums over the examples of each group (G, ...), of which `unbiased_hsic` is a function.

    Of rows x and y and of the diagonals a = x.x and b = y.y of their Gram matrices.
    """

    count_G: Tensor
    xy_GDE: Tensor
    x_GD: Tensor
    y_GE: Tensor
    xb_GD: Tensor
    ya_GE: Tensor
    a_G: Tensor
    b_G: Tensor
    ab_G: Tensor


def _moments(x_ND: Tensor, y_NE: Tensor, group_N: Tensor, groups: int) -> _Moments:
    # Shifts do not change the estimate; without a mean its terms are small.
    x_ND, y_NE = (z.double() - z.double().mean(0) for z in (x_ND, y_NE))
    found = []
    for group in range(groups):
        x, y = x_ND[group_N == group], y_NE[group_N == group]
        a, b = x.square().sum(1), y.square().sum(1)
        count = torch.tensor(len(x), dtype=torch.float64)
        found.append((count, x.T @ y, x.sum(0), y.sum(0), x.T @ b, y.T @ a, a.sum(), b.sum(), a @ b))
    return _Moments(*(torch.stack(values) for values in zip(*found, strict=True)))


def _hsic(sums: Sequence[Tensor]) -> float:
    """The estimate from the moments of all examples."""
    count, xy_DE, x_D, y_E, xb_D, ya_E, a, b, ab = sums
    # Gram matrices with zeroed diagonals: trace of their product, sums of all entries, product of their row sums.
    trace = xy_DE.square().sum() - ab
    every = (x_D @ x_D - a) * (y_E @ y_E - b)
    rows = x_D @ xy_DE @ y_E - x_D @ xb_D - y_E @ ya_E + ab
    return float((trace + every / ((count - 1) * (count - 2)) - 2 * rows / (count - 2)) / (count * (count - 3)))


def unbiased_hsic(x_ND: Tensor, y_NE: Tensor) -> float:
    """Unbiased Hilbert-Schmidt independence criterion with linear kernels, float64, of at least 4 examples.

    Song et al.'s estimator on Gram matrices with zeroed diagonals, computed from D x E products: no N x N matrix is
    formed.
    """
    assert len(x_ND) >= 4
    return _hsic([value_G[0] for value_G in _moments(x_ND, y_NE, torch.zeros(len(x_ND)), 1)])


def debiased_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """CKA in which each term is `unbiased_hsic`: about 0 for independent representations, 1 for equal ones.

    Invariant to orthogonal maps, shifts and isotropic scaling of either. NaN where a representation is constant.
    """
    return _ratio(unbiased_hsic(x_ND, y_NE), unbiased_hsic(x_ND, x_ND), unbiased_hsic(y_NE, y_NE))


def grouped_cka(x_ND: Tensor, y_NE: Tensor, group_N: Tensor, groups: int) -> Estimate:
    """`debiased_cka` with its delete-one-group jackknife error.

    Args:
        x_ND: a representation.
        y_NE: another one of the same examples.
        group_N: group of each example, in [0, groups).
        groups: number of groups, which are independent of each other.
    """
    pairs = (x_ND, y_NE), (x_ND, x_ND), (y_NE, y_NE)
    moments = [_moments(*pair, group_N, groups) for pair in pairs]
    totals = [[value_G.sum(0) for value_G in one] for one in moments]
    whole = _ratio(*(_hsic(total) for total in totals))
    without = torch.tensor(
        [
            _ratio(
                *(
                    _hsic([every - value_G[group] for every, value_G in zip(total, one, strict=True)])
                    for total, one in zip(totals, moments, strict=True)
                )
            )
            for group in range(groups)
        ],
        dtype=torch.float64,
    )
    se = math.sqrt((groups - 1) / groups * float((without - without.mean()).square().sum()))
    return Estimate(whole, se, groups)


def _ratio(both: float, one: float, other: float) -> float:
    return both / math.sqrt(one * other) if one > 0 and other > 0 else math.nan

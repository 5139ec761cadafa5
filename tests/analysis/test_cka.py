"""CKA, against its definition by Gram matrices, and what must not change it."""

import math

import pytest
import torch
from torch import Tensor

from t2i_lm.analysis.cka import debiased_cka, grouped_cka, unbiased_hsic


def representations(count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(count, 6, generator=generator) + 3
    return x_ND, x_ND[:, :4] @ torch.randn(4, 9, generator=generator) + torch.randn(count, 9, generator=generator)


def hsic_of_definition(x_ND: Tensor, y_NE: Tensor) -> float:
    """Song et al.'s estimator, by U-centered Gram matrices (Szekely and Rizzo, 2014)."""
    count = len(x_ND)

    def centered(z: Tensor) -> Tensor:
        gram = z.double() @ z.double().T
        gram.fill_diagonal_(0)
        rows = gram.sum(1)
        gram = gram - rows[:, None] / (count - 2) - rows / (count - 2) + gram.sum() / ((count - 1) * (count - 2))
        return gram.fill_diagonal_(0)

    return float((centered(x_ND) * centered(y_NE)).sum() / (count * (count - 3)))


def biased_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Kornblith et al.'s: doubly centered Gram matrices."""
    centering = torch.eye(len(x_ND), dtype=torch.float64) - 1 / len(x_ND)
    grams = [centering @ z.double() @ z.double().T @ centering for z in (x_ND, y_NE)]
    return float((grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()))


def test_hsic_is_that_of_the_definition() -> None:
    x_ND, y_NE = representations()
    for one, other in ((x_ND, y_NE), (x_ND, x_ND), (y_NE, y_NE)):
        assert unbiased_hsic(one, other) == pytest.approx(hsic_of_definition(one, other), rel=1e-9)


def test_it_approaches_the_textbook_value_with_many_examples() -> None:
    x_ND, y_NE = representations(500)
    assert debiased_cka(x_ND, y_NE) == pytest.approx(biased_cka(x_ND, y_NE), abs=2e-2)


def test_rotation_scale_and_shift_do_not_change_it() -> None:
    x_ND, y_NE = representations()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    value = debiased_cka(x_ND, y_NE)
    assert debiased_cka(5 * x_ND @ rotation + 2, 0.1 * y_NE) == pytest.approx(value, abs=1e-6)
    assert debiased_cka(x_ND, 3 * x_ND @ rotation - 1) == pytest.approx(1, abs=1e-6)
    stretched = x_ND * torch.tensor([10.0, 1, 1, 1, 1, 1])
    assert debiased_cka(stretched, y_NE) != pytest.approx(value, abs=1e-2)


def test_independent_representations_score_zero_where_the_biased_form_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(30, 40, generator=generator) for _ in range(2)] for _ in range(40)]
    assert abs(sum(debiased_cka(*pair) for pair in pairs) / 40) < 0.03
    assert sum(biased_cka(*pair) for pair in pairs) / 40 > 0.4


def test_the_error_is_the_jackknife_over_groups() -> None:
    x_ND, y_NE = representations()
    group_N = torch.arange(40) // 5
    estimate = grouped_cka(x_ND, y_NE, group_N, 8)
    without = [debiased_cka(x_ND[group_N != group], y_NE[group_N != group]) for group in range(8)]
    mean = sum(without) / 8
    assert estimate.value == pytest.approx(debiased_cka(x_ND, y_NE))
    assert estimate.se == pytest.approx(math.sqrt(7 / 8 * sum((value - mean) ** 2 for value in without)), rel=1e-6)
    assert estimate.n == 8


def test_a_constant_representation_has_none() -> None:
    x_ND, _ = representations()
    assert math.isnan(debiased_cka(x_ND, torch.ones(40, 3)))

"""Geometry of rows, on matrices whose geometry is known."""

import math

import pytest
import torch

from t2i_lm.analysis.rows import _singular_values, matrix_geometry, row_geometry


def test_orthogonal_rows_have_full_rank_and_no_common_direction() -> None:
    found = row_geometry(2 * torch.eye(8))
    assert found == {
        "rows": 8,
        "mean_norm": pytest.approx(2),
        "mean_cosine": pytest.approx(0, abs=1e-9),
        "effective_rank": pytest.approx(8),
    }


def test_parallel_rows_have_rank_one_and_cosine_one() -> None:
    found = row_geometry(torch.arange(1.0, 5)[:, None] * torch.tensor([3.0, 4.0]))
    assert found["mean_norm"] == pytest.approx(12.5)
    assert found["mean_cosine"] == pytest.approx(1)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-6)


def test_measures_of_random_rows_are_those_of_their_definitions() -> None:
    rows_RD = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    found = row_geometry(rows_RD)
    cosines = [
        torch.cosine_similarity(rows_RD[one], rows_RD[two], dim=0).item()
        for one in range(12)
        for two in range(12)
        if one != two
    ]
    assert found["mean_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    values = torch.linalg.svdvals(rows_RD)
    share = values / values.sum()
    assert found["effective_rank"] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-5)
    assert _singular_values(rows_RD.double()).flip(0) == pytest.approx(values.double(), rel=1e-5)
    assert _singular_values(rows_RD.T.double())[-5:].flip(0) == pytest.approx(values.double(), rel=1e-5)


def test_the_distance_of_modalities_is_that_of_their_means() -> None:
    text, image = torch.tensor([[1.0, 0], [3, 0]]), torch.tensor([[0.0, 3], [0, 5], [0, 4]])
    found = matrix_geometry({"text": text, "image": image})
    assert found["distance"] == pytest.approx(math.hypot(2, 4))
    assert found["relative_distance"] == pytest.approx(math.hypot(2, 4) / (16 / 5))

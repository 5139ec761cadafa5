from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_lm.data.permutation import Permutation


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 2**32))
def test_every_element_occurs_once(size: int, seed: int) -> None:
    assert sorted(Permutation(size, seed)[np.arange(size)].tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 999_983, 10**12 + 1, 2**62])
def test_arrays_of_any_integer_type_and_shape_agree_with_single_elements(size: int) -> None:
    permutation = Permutation(size, (3, "epoch"))
    indices = np.linspace(0, size - 1, 12).astype(np.int64).clip(0, size - 1)
    expected = [permutation[int(index)] for index in indices]
    assert permutation[indices].tolist() == expected
    assert permutation[indices].dtype == np.int64
    assert permutation[indices.astype(np.uint64).reshape(3, 4)].tolist() == np.reshape(expected, (3, 4)).tolist()
    assert permutation[indices[0]] == expected[0]
    assert permutation.index(permutation[indices]).tolist() == indices.tolist()
    assert [permutation.index(value) for value in expected] == indices.tolist()
    assert all(0 <= value < size for value in expected)


def test_a_permutation_is_a_function_of_size_and_seed() -> None:
    indices = np.arange(10_000)
    values = Permutation(10_000, 0)[indices]
    assert (values == Permutation(10_000, 0)[indices]).all()
    for other in (Permutation(10_000, 1), Permutation(10_000, (0, 0))):
        assert (values == other[indices]).sum() < 12  # one on average
    # Golden values: an order that changes would give earlier runs other data.
    assert Permutation(10**6, 0)[np.arange(4)].tolist() == [40068, 841718, 158672, 285284]


def test_images_are_uniform_and_neighbors_independent() -> None:
    size, cells = 1_000_003, 10
    values = Permutation(size, 5)[np.arange(100_000)]
    cell = values * cells // size
    counts = np.bincount(cell, minlength=cells)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 34  # chi-square of 9, p = 1e-4
    pairs = np.bincount(cell[:-1] * cells + cell[1:], minlength=cells**2)
    assert ((pairs - 1000) ** 2 / 1000).sum() < 160  # chi-square of 99, p = 1e-4
    steps = np.diff(values)
    assert len(np.unique(steps)) > 0.9 * len(steps)
    assert abs(np.corrcoef(np.arange(len(values)), values)[0, 1]) < 0.013  # 4 standard errors


def test_small_permutations_are_uniform_over_seeds() -> None:
    seeds = 2000
    tables = np.stack([Permutation(5, seed)[np.arange(5)] for seed in range(seeds)])
    for place in range(5):
        counts = np.bincount(tables[:, place], minlength=5)
        assert ((counts - seeds / 5) ** 2 / (seeds / 5)).sum() < 24  # chi-square of 4, p = 1e-4
    orders = {tuple(row) for row in tables.tolist()}
    assert len(orders) == 120


@pytest.mark.parametrize("index", [-1, 10, np.array([0, 10]), np.array([-1])])
def test_an_index_out_of_range_is_an_error(index: Any) -> None:
    with pytest.raises(IndexError, match="permutation of 10"):
        Permutation(10, 0)[index]
    with pytest.raises(IndexError, match="permutation of 10"):
        Permutation(10, 0).index(index)


@pytest.mark.parametrize("size", [-1, 2**62 + 1])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"expected 0 to 2\*\*62"):
        Permutation(size, 0)

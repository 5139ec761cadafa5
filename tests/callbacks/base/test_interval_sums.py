"""Sums of an interval in a checkpoint, separate for each rank."""

import pytest
import torch

from callbacks.base.interval_sums import IntervalSums


def vector(*values: float) -> torch.Tensor:
    """Sums of one micro-batch."""
    return torch.tensor(values, dtype=torch.float64)


def test_an_unfinished_step_is_in_no_total_and_no_checkpoint() -> None:
    sums = IntervalSums(2)
    sums.add(vector(1, 2))
    sums.end_step()
    sums.add(vector(10, 20))
    assert sums.total().tolist() == [1, 2]
    assert sums.state().tolist() == [[1, 2]]
    sums.add(vector(100, 200))
    sums.end_step()
    assert sums.take().tolist() == [111, 222]
    assert sums.total().tolist() == [0, 0]


def test_reading_totals_changes_nothing() -> None:
    sums = IntervalSums(1)
    sums.add(vector(1))
    sums.end_step()
    sums.total().zero_()
    sums.state().zero_()
    assert sums.take().tolist() == [1]


@pytest.mark.parametrize(
    ("world", "expected"), [(2, [[1, 2], [10, 20]]), (1, [[11, 22]]), (3, [[11, 22], [0, 0], [0, 0]])]
)
def test_each_rank_gets_its_own_sums_or_the_first_gets_all(world: int, expected: list[list[float]]) -> None:
    saved = torch.tensor([[1, 2], [10, 20]], dtype=torch.float64)
    loaded = [IntervalSums(2) for _ in range(world)]
    for rank, sums in enumerate(loaded):
        sums.load(saved, rank, world)
    assert [sums.take().tolist() for sums in loaded] == expected

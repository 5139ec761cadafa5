from collections import Counter

import pytest

from t2i_lm.data.order import ShuffledOrder
from t2i_lm.data.sampler import Draw, IndexSampler


def draws(consumed: int = 0, rank: int = 0, world: int = 1, accumulate: int = 1) -> list[list[Draw]]:
    sampler = IndexSampler(ShuffledOrder(50, 3), 12, 20, rank=rank, world=world, accumulate=accumulate)
    sampler.consumed = consumed
    return list(sampler)


def test_each_sample_is_drawn_once_per_epoch() -> None:
    flat = [draw for batch in draws() for draw in batch]
    assert len(flat) == 240
    counts = Counter(flat)
    assert set(counts.values()) == {1}
    assert all(counts[epoch, index] == 1 for epoch in range(4) for index in range(50))


def test_epochs_are_shuffled_differently() -> None:
    flat = [index for batch in draws() for _, index in batch]
    assert flat[:50] != flat[50:100]
    assert flat[:50] != sorted(flat[:50])


@pytest.mark.parametrize("step", range(20))
def test_a_resumed_order_continues_the_uninterrupted_one(step: int) -> None:
    assert draws(consumed=step * 12) == draws()[step:]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 3), (2, 3), (4, 1)])
def test_global_batches_do_not_depend_on_ranks_or_accumulation(world: int, accumulate: int) -> None:
    whole = draws()
    parts = [draws(rank=rank, world=world, accumulate=accumulate) for rank in range(world)]
    for step in range(20):
        joined = []
        for part in range(accumulate):
            for rank in range(world):
                joined += parts[rank][step * accumulate + part]
        assert joined == whole[step]


def test_the_stream_hash_depends_on_the_seed() -> None:
    first, second = (IndexSampler(ShuffledOrder(50, seed), 12, 20).stream_hash(120) for seed in (0, 1))
    assert first != second
    assert first == IndexSampler(ShuffledOrder(50, 0), 12, 20).stream_hash(120)

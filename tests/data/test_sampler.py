from collections import Counter
from types import SimpleNamespace

import pytest

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig, TrainerConfig
from t2i_lm.data.datamodules import BatchDataModule
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


@pytest.mark.parametrize(("strategy", "samples"), [("fsdp2", 500), ("hsdp", 17), ("fsdp2", 16), ("ddp", 500)])
def test_sharded_ranks_validate_in_equally_many_batches(strategy: str, samples: int) -> None:
    trainer = TrainerConfig(devices=8, strategy=strategy)
    data = BatchDataModule(ExperimentConfig(data=DataConfig(batch_size=16), trainer=trainer))
    batches = []
    for rank in range(8):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=8)  # type: ignore[assignment]
        batches.append(data.validation_batches(range(samples)))
    assert sorted(draw for one in batches for batch in one for draw in batch) == [(0, n) for n in range(samples)]
    assert {len(batch) for one in batches for batch in one} <= {1, 2}
    assert len({len(one) for one in batches}) == (2 if strategy == "ddp" else 1)


def of_rank(rank: int, strategy: str) -> BatchDataModule:
    """The data of one of eight ranks, a sample at a time."""
    trainer = TrainerConfig(devices=8, strategy=strategy)
    data = BatchDataModule(ExperimentConfig(data=DataConfig(batch_size=8), trainer=trainer))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=8)  # type: ignore[assignment]
    return data


def test_fewer_validation_samples_than_ranks_are_refused() -> None:
    data = of_rank(0, "ddp")
    with pytest.raises(ValueError, match=r"^data\.val_size: 7 validation samples over 8 processes: expected "):
        data.validation_batches(range(7))
    assert data.validation_batches(range(8)) == [[(0, 0)]]


def test_too_few_validation_samples_for_sharded_ranks_are_refused() -> None:
    data = of_rank(7, "fsdp2")
    with pytest.raises(ValueError, match=r"^data\.val_size: 9 validation samples over 8 processes, 1 at a time: "):
        data.validation_batches(range(9))
    assert data.validation_batches(range(16)) == [[(0, 7)], [(0, 15)]]

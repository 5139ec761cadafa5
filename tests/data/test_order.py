"""Orders of the samples of an epoch, and their split over processes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig, OptimConfig, TrainerConfig
from t2i_lm.data.datamodules import BatchDataModule, make_sampler
from t2i_lm.data.order import CURRENT, FORMER, FormerOrder, Indices, Order, PartsOrder, ShuffledOrder
from t2i_lm.data.sampler import IndexSampler

SIZES = [100, 100, 37, 100, 1, 0, 100, 62]
ORDERS: dict[str, Order] = {
    "shuffled": ShuffledOrder(500, 3),
    "parts": PartsOrder(SIZES, 3, lanes=4, batch_size=12),
    "one lane": PartsOrder(SIZES, 3, lanes=1, batch_size=12),
    "lanes that do not divide a batch": PartsOrder(SIZES, 3, lanes=5, batch_size=12),
    "more lanes than a batch": PartsOrder(SIZES, 3, lanes=40, batch_size=12),
    "more lanes than samples": PartsOrder(SIZES, 3, lanes=900, batch_size=12),
}


def whole(order: Order, epoch: int) -> Indices:
    return order.indices(epoch, np.arange(order.size))


@pytest.mark.parametrize("name", ORDERS)
def test_an_epoch_has_every_sample_once_and_its_own_order(name: str) -> None:
    order = ORDERS[name]
    first, second = whole(order, 0), whole(order, 1)
    assert sorted(first) == sorted(second) == list(range(500))
    assert (first == second).mean() < 0.05
    assert (first == np.arange(500)).mean() < 0.05
    places = np.array([499, 3, 250, 3])
    assert np.array_equal(order.indices(1, places), second[places])


def test_places_of_a_sample_in_two_epochs_are_uniform_and_independent() -> None:
    """Counts of (place in epoch 0, place in epoch 1), in tenths, by chi-squared over 20 seeds of 2,000 samples."""
    counts = np.zeros((10, 10))
    for seed in range(20):
        order = ShuffledOrder(2000, seed)
        places = [np.argsort(whole(order, epoch)) // 200 for epoch in (0, 1)]
        counts += np.bincount(places[0] * 10 + places[1], minlength=100).reshape(10, 10)
    expected = 20 * 2000 / 100
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert 45 < statistic < 130  # 81 degrees of freedom: mean 81, standard deviation 12.7


def test_neighbors_of_the_data_are_not_neighbors_in_the_order() -> None:
    order = whole(ShuffledOrder(5000, 0), 0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert (np.diff(order) == 1).sum() <= 6  # one is expected


def test_a_batch_mixes_as_many_parts_as_there_are_lanes() -> None:
    order = PartsOrder([64] * 40, 0, lanes=8, batch_size=16)
    first = whole(order, 0)
    for start in range(0, 512, 16):
        parts = Counter((first[start : start + 16] // 64).tolist())
        assert list(parts.values()) == [2] * 8
    # A process with a quarter of every batch reads a quarter of the parts.
    quarter = np.concatenate([first[start : start + 4] for start in range(0, len(first), 16)])
    assert len(set((quarter // 64).tolist())) == 10
    # At any time 8 parts are in use: each part is read within its turn.
    for part in range(40):
        (places,) = np.nonzero(first // 64 == part)
        assert places.max() - places.min() < 64 * 8


@pytest.mark.parametrize("shuffle_parts", [None, 4])
@pytest.mark.parametrize(("devices", "accumulate"), [(1, 3), (2, 1), (2, 3), (4, 1)])
def test_global_batches_do_not_depend_on_processes_and_continue_from_any_position(
    shuffle_parts: int | None, devices: int, accumulate: int
) -> None:
    def sampler(rank: int = 0, devices: int = 1, accumulate: int = 1) -> IndexSampler:
        config = ExperimentConfig(
            seed=5,
            data=DataConfig(batch_size=24, shuffle_parts=shuffle_parts),
            optim=OptimConfig(warmup_steps=1),
            trainer=TrainerConfig(max_steps=60, devices=devices, accumulate_grad_batches=accumulate),
        )
        return make_sampler(config, np.array(SIZES), rank, devices)

    batches = list(sampler())
    assert sorted(index for batch in batches for epoch, index in batch if epoch == 1) == list(range(500))
    ranks = []
    for rank in range(devices):
        part = sampler(rank, devices, accumulate)
        part.consumed = 7 * 24
        ranks.append(list(part))
    for step, batch in enumerate(batches[7:]):
        rows = range(step * accumulate, (step + 1) * accumulate)
        assert [draw for row in rows for rank in ranks for draw in rank[row]] == batch


def test_the_sampler_announces_what_it_draws_later() -> None:
    sampler = IndexSampler(PartsOrder(SIZES, 0, 4, 8), 8, 30, rank=1, world=2)
    announced: list[list[int]] = []
    sampler.announce, sampler.ahead = lambda indices: announced.append(indices.tolist()), 5 * 8
    drawn = [[index for _, index in batch] for batch in sampler]
    assert announced == drawn[5:]


def test_a_run_of_an_older_version_keeps_its_order() -> None:
    config = ExperimentConfig(seed=2, data=DataConfig(batch_size=10), trainer=TrainerConfig(max_steps=3000))
    former = make_sampler(config, 50, version=FORMER)
    assert [index for _, index in next(iter(former))] == np.random.default_rng([2, 0]).permutation(50)[:10].tolist()
    data = BatchDataModule(config)
    assert data.state_dict() == {"consumed": 0, "order": CURRENT}
    data.load_state_dict({"consumed": 30})
    assert data.state_dict() == {"consumed": 30, "order": FORMER}
    with pytest.raises(ValueError, match="order of version 9, which a newer t2i_lm wrote"):
        data.load_state_dict({"consumed": 30, "order": 9})


def test_the_hash_of_a_stream_tells_the_version_of_what_stands_beside_the_draws() -> None:
    plain = ExperimentConfig(data=DataConfig(batch_size=10), trainer=TrainerConfig(max_steps=3000))
    replay = replace(plain, data=DataConfig(batch_size=10, replay_ratio=0.2, replay_path="x"))
    for config, told in ((plain, False), (replay, True)):
        now, before = (make_sampler(config, 50, version=version).stream_hash(100) for version in (CURRENT, 2))
        assert (now != before) is told


def test_an_order_of_134_million_samples_holds_no_array_of_them() -> None:
    for order in (ShuffledOrder(134_000_000, 0), PartsOrder(np.full(16_384, 8192), 0, 16, 64)):
        sampler = IndexSampler(order, 64, 2 * 10**6)
        sampler.consumed = 64 * 1_234_567
        assert len(next(iter(sampler))) == 64
        held = sum(value.nbytes for value in vars(order).values() if isinstance(value, np.ndarray))
        assert held < 10**6
    assert FormerOrder(10, 0).size == 10

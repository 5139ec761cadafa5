"""Windows of replayed text and partners of shuffled pairs: functions of seed and position, without arrays of them."""

import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest

from t2i_lm.data.alignment import BagBatches
from t2i_lm.data.datamodules import PairBatches
from t2i_lm.data.order import CURRENT, FORMER
from t2i_lm.data.replay import ReplayBatches
from t2i_lm.data.sampler import REPLAYED
from t2i_lm.data.shards.parts import Parts
from tests.data.shards.pair_shards import LAYOUT, write_pairs

WINDOWS = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("shards"))


def replay(folder: Path, seed: int = 3) -> ReplayBatches:
    rows = datasets.Dataset.from_dict({"text_ids": [[number] * LAYOUT.length for number in range(WINDOWS)]})
    parts = Parts(folder, "train")
    pairs = PairBatches(parts, LAYOUT, "first", seed, 8)
    return ReplayBatches(pairs, rows.with_format("numpy"), seed, parts)


def windows(batches: ReplayBatches, numbers: range) -> list[int]:
    found: list[int] = batches.__getitems__([(REPLAYED, number) for number in numbers])["ids_BT"][:, 0].tolist()
    return found


def test_every_window_is_replayed_once_per_epoch_in_its_own_order(folder: Path) -> None:
    batches = replay(folder)
    epochs = [windows(batches, range(WINDOWS * epoch, WINDOWS * (epoch + 1))) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(WINDOWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert windows(replay(folder), range(30, 40)) == (epochs[1] + epochs[2])[7:17]  # resumed
    assert windows(replay(folder, seed=4), range(WINDOWS)) != epochs[0]


def test_runs_of_older_versions_keep_their_windows_and_partners(folder: Path) -> None:
    batches = replay(folder)
    bags = BagBatches(Parts(folder, "train"), "first", 3, shuffle_pairs=True)
    for version in (FORMER, 2):
        batches.order = bags.order = version
        former = np.random.default_rng([3, 1, 2]).permutation(WINDOWS).tolist()
        assert windows(batches, range(WINDOWS, 2 * WINDOWS)) == former
        cycle = np.random.default_rng([3, 1]).permutation(len(bags))
        assert bags._partners(cycle).tolist() == np.roll(cycle, 1).tolist()


def test_shuffled_pairs_are_a_single_cycle(folder: Path) -> None:
    bags = BagBatches(Parts(folder, "train"), "first", 3, shuffle_pairs=True)
    indices = np.arange(len(bags))
    partners = bags._partners(indices)
    assert sorted(partners.tolist()) == indices.tolist()
    seen, at = set[int](), 0
    while at not in seen:
        seen.add(at)
        at = int(partners[at])
    assert len(seen) == len(bags)
    assert (partners == bags._partners(indices)).all()
    assert (partners != BagBatches(Parts(folder, "train"), "first", 4, shuffle_pairs=True)._partners(indices)).any()
    plain = BagBatches(Parts(folder, "train"), "first", 3).__getitems__([(0, int(partners[5]))])
    assert bags.__getitems__([(0, 5)])["text_ids_L"].tolist() == plain["text_ids_L"].tolist()
    # Nothing of the size of the data is held, nor sent to a worker.
    assert bags.order == CURRENT
    assert len(pickle.dumps(bags)) < 5000

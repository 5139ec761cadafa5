"""Orders of the samples of an epoch: a permutation of all of them, or parts in a seeded order, several at a time.

An order is a function of (sizes, seed, epoch, place in the epoch), computed where it is asked for. None depends on the
number of processes, so that a run continues exactly on another number of them, and both arms of a pair see one stream.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from t2i_lm.data.permutation import Permutation

Indices = npt.NDArray[np.int64]
# Version of the orders, recorded in checkpoints. 1: `FormerOrder`, of checkpoints that record none. 2: windows of
# replayed text and shuffled partners are from `former_permutation`, as in 1. 3: nothing is an array of all samples.
FORMER, CURRENT = 1, 3


class Order(Protocol):
    """An order of `size` samples."""

    @property
    def size(self) -> int: ...

    def indices(self, epoch: int, places: Indices) -> Indices:
        """Indices of the samples at some places, in [0, size), of an epoch."""
        ...


class FormerOrder:
    """The order of version 1: NumPy's permutation, an array of all samples."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self._seed = size, seed

    def indices(self, epoch: int, places: Indices) -> Indices:
        return former_permutation(self.size, self._seed, epoch)[places]


@lru_cache(maxsize=4)
def former_permutation(size: int, *seed: int) -> Indices:
    """NumPy's permutation: an array of all elements."""
    return np.random.default_rng(seed).permutation(size)


class ShuffledOrder:
    """One permutation of all samples per epoch, without an array of them."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self._seed = size, seed

    def indices(self, epoch: int, places: Indices) -> Indices:
        return keyed(self.size, "order", self._seed, epoch)[places]


class PartsOrder:
    """Parts in a seeded order, read in lanes: each reads its own parts one after the other.

    An epoch is the sequence of its shuffled parts, each with its samples shuffled, cut into `lanes` equal stretches. A
    batch takes equally many samples from each stretch, in order of the lanes: so it mixes as many parts as there are
    lanes, and a process that trains on a contiguous share of every batch reads the parts of its own lanes alone. The
    few samples that do not fill a row of all lanes come last.
    """

    def __init__(self, sizes: Sequence[int] | Indices, seed: int, lanes: int, batch_size: int) -> None:
        """`sizes` are the samples of each part; `lanes` should divide the global batch size."""
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.size = int(self._sizes.sum())
        self._seed, self._lanes = seed, lanes
        self._chunk = max(1, batch_size // lanes)  # consecutive samples of a lane
        self._stretch = self.size // (self._chunk * lanes) * self._chunk
        self._epoch, self._parts, self._ends = -1, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)

    def indices(self, epoch: int, places: Indices) -> Indices:
        if epoch != self._epoch:
            shuffled = Permutation(len(self._sizes), ("parts", self._seed, epoch))
            self._parts = shuffled[np.arange(len(self._sizes))]
            self._ends, self._epoch = np.cumsum(self._sizes[self._parts]), epoch
        row, place = np.divmod(places, self._chunk * self._lanes)
        lane, offset = np.divmod(place, self._chunk)
        in_lanes = places < self._stretch * self._lanes
        sequence = np.where(in_lanes, lane * self._stretch + row * self._chunk + offset, places)
        numbers = np.searchsorted(self._ends, sequence, side="right")
        found = np.empty_like(sequence)
        for number in np.unique(numbers):
            chosen, part = numbers == number, int(self._parts[number])
            size = int(self._sizes[part])
            within = sequence[chosen] - (int(self._ends[number]) - size)
            found[chosen] = self._starts[part] + keyed(size, "part", self._seed, epoch, part)[within]
        return found


@lru_cache(maxsize=1024)
def keyed(size: int, *seed: int | str) -> Permutation:
    """The permutation of a size and seed, kept while it is in use."""
    return Permutation(size, seed)

"""The data order of a run: an order of the samples per epoch, cut into global batches; random choices per sample.

The order is a function of (sizes, batch size, seed, position), and the position is one integer, the samples consumed so
far. A resumed run, on the same or another number of processes, therefore has the global batches of an uninterrupted
one.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from t2i_lm.data.order import Indices, Order

# (epoch, dataset index): random choices for a sample may depend on both, never on the rank or the worker.
Draw = tuple[int, int]
# In place of the epoch: the draw is a window of replayed text, and its index counts the windows since step 0.
REPLAYED = -1
# Places whose indices are computed together: a batch alone would cost as much as many.
BLOCK = 2**14


class IndexSampler(Sampler[list[Draw]]):
    """Yields this rank's micro-batches of draws, from `consumed` to the end of the run.

    One pass over the sampler is the whole run, for any number of epochs: an epoch that ends inside a batch is
    continued by the next one, so every index is drawn once per epoch.

    Attributes:
        consumed: samples already trained on, over all ranks; set on resume, before iteration.
        announce: called before each batch with the indices that this rank draws `ahead` samples later, so that what
            they are read from can be fetched; None: nothing is.
        mark: of what `stream_hash` covers beside the draws.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        steps: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        replayed: int = 0,
    ) -> None:
        """`batch_size` is global, `steps` are optimizer steps, `accumulate` micro-batches make one step.

        `replayed` evenly spaced draws of every batch are windows of text in place of samples.
        """
        assert batch_size % (world * accumulate) == 0
        if order.size < 1:
            raise ValueError("the training set is empty")
        self.order, self.batch_size, self.steps = order, batch_size, steps
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.replayed = replayed
        self.consumed = 0
        self.announce: Callable[[Indices], None] | None = None
        self.ahead = 0
        self.mark = b""
        self._block = lru_cache(maxsize=4)(self._compute)  # of this batch, and of one ahead

    def __len__(self) -> int:
        """Micro-batches of the whole run per rank, also after resuming."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        end = self.steps * self.batch_size
        for start in range(self.consumed, end, self.batch_size):
            if self.announce is not None and start + self.ahead < end:
                later = np.concatenate(self._share(self.global_batch(start + self.ahead)))
                self.announce(later[later[:, 0] != REPLAYED, 1])
            for draws in self._share(self.global_batch(start)):
                yield [(epoch, index) for epoch, index in draws.tolist()]

    def _share(self, batch: Indices) -> list[Indices]:
        """This rank's micro-batches of a global batch."""
        micro = self.batch_size // (self.world * self.accumulate)
        firsts = ((part * self.world + self.rank) * micro for part in range(self.accumulate))
        return [batch[first : first + micro] for first in firsts]

    def global_batch(self, start: int) -> Indices:
        """Epochs and dataset indices (batch_size, 2) of the samples after `start` consumed ones."""
        epochs, indices = list[Indices](), list[Indices]()
        position = start
        while position < start + self.batch_size:
            epoch, place = divmod(position, self.order.size)
            rest = self._block(epoch, place // BLOCK)[place % BLOCK :][: start + self.batch_size - position]
            epochs.append(np.full(len(rest), epoch))
            indices.append(rest)
            position += len(rest)
        draws = np.stack([np.concatenate(epochs), np.concatenate(indices)], axis=1)
        if self.replayed:
            count = np.arange(self.batch_size + 1) * self.replayed // self.batch_size  # windows before each place
            replaced = np.flatnonzero(np.diff(count))
            draws[replaced, 0] = REPLAYED
            draws[replaced, 1] = start // self.batch_size * self.replayed + count[replaced]
        return draws

    def _compute(self, epoch: int, number: int) -> Indices:
        """Indices at `BLOCK` consecutive places of an epoch."""
        return self.order.indices(epoch, np.arange(number * BLOCK, min((number + 1) * BLOCK, self.order.size)))

    def stream_hash(self, samples: int) -> str:
        """sha256 of the first `samples` draws: equal in two arms with the same data order."""
        digest = hashlib.sha256(self.mark)
        for start in range(0, samples, self.batch_size):
            digest.update(self.global_batch(start).tobytes())
        return digest.hexdigest()


def choose_caption(captions: int, seed: int, epoch: int, index: int) -> int:
    """Which of several captions a sample has in an epoch."""
    return int(np.random.default_rng([seed, epoch, index]).integers(captions))


def drops_caption(share: float, seed: int, epoch: int, index: int) -> bool:
    """Whether `data.caption_dropout` empties a sample's caption in an epoch."""
    return bool(np.random.default_rng([seed, epoch, index, 1]).random() < share)

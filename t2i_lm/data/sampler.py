"""The data order of a run: one seeded permutation per epoch, cut into global batches; random choices per sample.

The order is a function of (size, batch size, seed, position), and the position is one integer, the samples consumed so
far. A resumed run, on the same or another number of processes, therefore has the global batches of an uninterrupted
one.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

# (epoch, dataset index): random choices for a sample may depend on both, never on the rank or the worker.
Draw = tuple[int, int]
# In place of the epoch: the draw is a window of replayed text, and its index counts the windows since step 0.
REPLAYED = -1


class IndexSampler(Sampler[list[Draw]]):
    """Yields this rank's micro-batches of draws, from `consumed` to the end of the run.

    One pass over the sampler is the whole run, for any number of epochs: an epoch that ends inside a batch is
    continued by the next one's permutation, so every index is drawn once per epoch.

    Attributes:
        consumed: samples already trained on, over all ranks; set on resume, before iteration.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        steps: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        replayed: int = 0,
    ) -> None:
        """`batch_size` is global, `steps` are optimizer steps, `accumulate` micro-batches make one step.

        `replayed` evenly spaced draws of every batch are windows of text in place of samples.
        """
        assert batch_size % (world * accumulate) == 0
        if size < 1:
            raise ValueError("the training set is empty")
        self.size, self.batch_size, self.steps, self.seed = size, batch_size, steps, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.replayed = replayed
        self.consumed = 0
        self._epoch = -1
        self._permutation: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Micro-batches of the whole run per rank, also after resuming."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        micro = self.batch_size // (self.world * self.accumulate)
        for start in range(self.consumed, self.steps * self.batch_size, self.batch_size):
            batch = self.global_batch(start)
            for part in range(self.accumulate):
                first = (part * self.world + self.rank) * micro
                yield [(epoch, index) for epoch, index in batch[first : first + micro].tolist()]

    def global_batch(self, start: int) -> npt.NDArray[np.int64]:
        """Epochs and dataset indices (batch_size, 2) of the samples after `start` consumed ones."""
        positions = np.arange(start, start + self.batch_size)
        epochs, offsets = positions // self.size, positions % self.size
        indices = np.concatenate(
            [self._epoch_permutation(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        draws = np.stack([epochs, indices], axis=1)
        if self.replayed:
            count = np.arange(self.batch_size + 1) * self.replayed // self.batch_size  # windows before each place
            places = np.flatnonzero(np.diff(count))
            draws[places, 0] = REPLAYED
            draws[places, 1] = start // self.batch_size * self.replayed + count[places]
        return draws

    def _epoch_permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            self._epoch = epoch
        return self._permutation

    def stream_hash(self, samples: int) -> str:
        """sha256 of the first `samples` draws: equal in two arms with the same data order."""
        digest = hashlib.sha256()
        for start in range(0, samples, self.batch_size):
            digest.update(self.global_batch(start).tobytes())
        return digest.hexdigest()


def choose_caption(captions: int, seed: int, epoch: int, index: int) -> int:
    """Which of several captions a sample has in an epoch."""
    return int(np.random.default_rng([seed, epoch, index]).integers(captions))


def drops_caption(share: float, seed: int, epoch: int, index: int) -> bool:
    """Whether `data.caption_dropout` empties a sample's caption in an epoch."""
    return bool(np.random.default_rng([seed, epoch, index, 1]).random() < share)

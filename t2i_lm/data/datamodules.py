"""LightningDataModules over prepared token shards.

The pipeline: `prepare` writes shards -> `Parts` memory-maps them -> `IndexSampler` yields (epoch, index) draws ->
`__getitems__` gathers a micro-batch in one read -> the batch dict of the modules. Its only state is the sampler's
integer `consumed`, which follows from the optimizer steps taken, and the version of the order.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, Self

import datasets
import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import SHARDED
from t2i_lm.data.order import CURRENT, FORMER, FormerOrder, Indices, Order, PartsOrder, ShuffledOrder
from t2i_lm.data.sampler import REPLAYED, Draw, IndexSampler, choose_caption, drops_caption
from t2i_lm.data.shards.columns import PairColumns
from t2i_lm.data.shards.format import STREAM, read_index, validation_splits
from t2i_lm.data.shards.made_parts import StreamedParts
from t2i_lm.data.shards.parts import Parts
from t2i_lm.data.splits import evenly_spaced_indices
from t2i_lm.data.text_ratio import TextRatio
from t2i_lm.runtime.devices import uses_gpu
from t2i_lm.tokenizers.layout import ImageLayout, IntArray, Layout

# `ids_BT` int64, `samples` int, `tokens_nominal` int (positions), `tokens_real` 0-d int64 (pads excluded).
Batch = dict[str, Any]
# Batches of remote samples that are fetched before they are read.
AHEAD = 64


class Batches(Dataset[Batch]):
    """A sized dataset that gathers a whole batch in one call.

    Attributes:
        order: version of the order, that of the run's first session.
    """

    order = CURRENT

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """The batch of (epoch, index) draws."""
        raise NotImplementedError

    @property
    def part_sizes(self) -> Indices:
        """Samples of each part that they are read from."""
        return np.array([len(self)])

    def name(self, draw: Draw) -> str:
        """A sample for messages."""
        return str(draw[1])

    @property
    def announce(self) -> Callable[[Indices], None] | None:
        """Begins to fetch what samples are read from, where it is remote; else None."""
        return None

    def close(self) -> None:
        """Ends what `announce` began."""


class CaptionedIds(Batches):
    """Prepared caption-image pairs; subclasses define the batch.

    Attributes:
        columns: their ids.
    """

    def __init__(self, split: Parts, captions: str, seed: int) -> None:
        self.captions, self.seed = captions, seed
        self.columns = PairColumns(split)
        # With captions="all", every caption is a sample.
        self._sizes = self.columns.captions_by_part() if captions == "all" else split.rows
        self._starts: list[int] = [0, *np.cumsum(self._sizes).tolist()]

    def __len__(self) -> int:
        return self._starts[-1]

    def cut(self, size: int | None) -> Self:
        """Leaves out the samples behind the first `size`."""
        if size is not None:
            self._starts = np.minimum(self._starts, size).tolist()
            self._sizes = np.diff(self._starts)
        return self

    @property
    def part_sizes(self) -> Indices:
        return self._sizes

    @property
    def announce(self) -> Callable[[Indices], None] | None:
        return self._fetch_later if self.columns.parts.is_remote else None

    def close(self) -> None:
        if isinstance(self.columns.parts, StreamedParts):
            self.columns.parts.close()

    def name(self, draw: Draw) -> str:
        """Index and `id`, which of remote parts is not read."""
        with suppress(OSError, ValueError, KeyError):
            if not self.columns.parts.is_remote:
                return f"{draw[1]} ({self.columns.parts.id(self._place(*draw)[0])})"
        return super().name(draw)

    def _fetch_later(self, indices: Indices) -> None:
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        self.columns.parts.fetch_later(np.unique(numbers).tolist())

    def pairs(self, draws: list[Draw]) -> tuple[list[IntArray], IntArray]:
        """Text ids of one caption per draw, and image ids (B, N)."""
        self.columns.open({bisect_right(self._starts, index) - 1 for _, index in draws})
        places = [self._place(*draw) for draw in draws]
        texts = [self._text(*place, *draw) for place, draw in zip(places, draws, strict=True)]
        return texts, self.columns.images([row for row, _ in places])

    def _text(self, row: int, number: int, epoch: int, index: int) -> IntArray:
        """Text ids of a draw whose caption is `number` of a row."""
        return self.columns.caption(row, number)

    def _place(self, epoch: int, index: int) -> tuple[int, int]:
        """Row and caption number of a draw."""
        if self.captions == "all":
            part = bisect_right(self._starts, index) - 1
            return self.columns.nth_caption(part, index - self._starts[part])
        if self.captions == "random" and (captions := self.columns.count(index)) > 1:
            return index, choose_caption(captions, self.seed, epoch, index)
        return index, 0


class PairBatches(CaptionedIds):
    """Caption-image pairs as batches of joint ids `ids_BT`."""

    def __init__(
        self,
        split: Parts,
        layout: Layout | ImageLayout,
        captions: str,
        seed: int,
        multiple: int,
        dropout: float = 0.0,
        ratio: TextRatio | None = None,
    ) -> None:
        """`multiple` is `data.pad_to_multiple_of`; `dropout` is the share of emptied captions."""
        super().__init__(split, captions, seed)
        self.layout, self.multiple, self.dropout, self.ratio = layout, multiple, dropout, ratio

    def __getitems__(self, draws: list[Draw]) -> Batch:
        texts, image_ids_BN = self.pairs(draws)
        if self.dropout:
            texts = [
                text[:0] if drops_caption(self.dropout, self.seed, *draw) else text
                for text, draw in zip(texts, draws, strict=True)
            ]
        return pack_batch(self.layout, texts, image_ids_BN, self.multiple)

    def _text(self, row: int, number: int, epoch: int, index: int) -> IntArray:
        if self.ratio is None:
            return super()._text(row, number, epoch, index)
        caption, count = partial(self.columns.caption, row), self.columns.count(row)
        return self.ratio.compose(caption, count, number, epoch, index)


def pack_batch(layout: Layout | ImageLayout, texts: list[IntArray], image_ids_BN: IntArray, multiple: int) -> Batch:
    """The batch of some pairs, as long as its longest sequence rounded up to a multiple."""
    ids_BT = layout.pack(texts, image_ids_BN)
    used_B = (ids_BT != layout.vocab.pad).sum(dim=1)
    longest = -(-int(used_B.max()) // multiple) * multiple
    return {
        "ids_BT": ids_BT[:, : min(layout.length, longest)],
        "samples": len(texts),
        "tokens_nominal": len(texts) * layout.length,
        "tokens_real": used_B.sum(),
    }


class TextBatches(Batches):
    """Rows of consecutive text ids."""

    def __init__(self, split: datasets.Dataset, parts: Parts) -> None:
        """`split` is rows of `parts`."""
        self.split, self.parts = split, parts

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        self.parts.require_unchanged()
        rows = self.split[[index for _, index in draws]]
        ids_BT = torch.from_numpy(np.stack(rows["text_ids"]).astype(np.int64))
        self.parts.require_unchanged()
        tokens = len(draws) * (ids_BT.shape[1] - 1)
        return {
            "ids_BT": ids_BT,
            "samples": len(draws),
            "tokens_nominal": tokens,
            "tokens_real": torch.tensor(tokens),
        }


def _identity(batch: Any) -> Any:
    return batch


def _leave_group(worker: int) -> None:
    """Spares a worker the signals that torchrun and terminals send to the whole group of a run that then saves."""
    os.setpgid(0, 0)


class BatchDataModule(pl.LightningDataModule):
    """Loaders over `Batches`: training in the order of `IndexSampler`, validation in sequence.

    Attributes:
        train_set: the training data, opened in `setup`.
        val_sets: the validation data by split, the primary split first, opened in `setup`.
        validation_splits: the keys of `val_sets`: `val`, or `val/NAME` of each of several splits.
    """

    train_set: Batches
    val_sets: Mapping[str, Batches]

    def __init__(self, config: ExperimentConfig, validation_splits: Sequence[str] = ("val",)) -> None:
        super().__init__()
        self.config, self.validation_splits = config, tuple(validation_splits)
        self._consumed, self._order = 0, CURRENT

    @property
    def val_set(self) -> Batches:
        """The primary validation split."""
        return self.val_sets[self.validation_splits[0]]

    @property
    def val_size(self) -> int | None:
        """Samples of a validation split that are used of those prepared; None: all, `prepare` has left out others."""
        return self.config.data.val_size if self.config.data.source == "hub_stream" else None

    @property
    def consumed(self) -> int:
        """Samples trained on so far, over all ranks: the whole state."""
        return int(self.trainer.global_step) * self.config.data.batch_size if self.trainer else self._consumed

    @property
    def place(self) -> tuple[int, int]:
        """This process's rank and the number of ranks; 0 of 1 without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader[Batch]:
        """One loader for the rest of the run, however many epochs."""
        rank, world = self.place
        sampler = make_sampler(self.config, self.train_set.part_sizes, rank, world, self._order)
        sampler.consumed = self._consumed
        sampler.announce = self.train_set.announce
        sampler.ahead = AHEAD * self.config.data.batch_size
        return self._loader(self.train_set, sampler)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """A loader of each validation split."""
        return [self._loader(split, self.validation_batches(split)) for split in self.val_sets.values()]

    def sample_names(self, step: int) -> list[str]:
        """The samples of the global batch after `step` steps, in order, for messages."""
        sampler = make_sampler(self.config, self.train_set.part_sizes, version=self._order)
        draws = sampler.global_batch(step * self.config.data.batch_size).tolist()
        return [f"text {index}" if epoch == REPLAYED else self.train_set.name((epoch, index)) for epoch, index in draws]

    def validation_batches(self, split: Batches) -> list[list[Draw]]:
        """This rank's batches of a validation split, every sample once over all ranks.

        Sharded ranks gather weights in each batch: they have equally many, some of fewer samples.

        Raises:
            ValueError: if a rank has no sample, or a sharded rank too few for that.
        """
        (rank, world), micro = self.place, self.config.micro_batch
        if len(split) < world:
            raise ValueError(
                f"data.val_size: {len(split):,} validation samples over {world} processes: expected at least {world}, "
                "one for each"
            )
        draws = [(0, index) for index in range(rank, len(split), world)]
        batches = [draws[start : start + micro] for start in range(0, len(draws), micro)]
        fewest, most = len(split) // world, ceil(ceil(len(split) / world) / micro)
        if self.config.trainer.strategy not in SHARDED or ceil(fewest / micro) == most:
            return batches
        if fewest < most:
            raise ValueError(
                f"data.val_size: {len(split):,} validation samples over {world} processes, {micro} at a time: with "
                f"trainer.strategy={self.config.trainer.strategy} expected a multiple of {world}"
            )
        places = np.linspace(0, len(draws), most + 1).astype(int)
        return [draws[start:end] for start, end in pairwise(places)]

    def open(self, folder: Path, split: str) -> Parts:
        """A split of prepared shards.

        Raises:
            ValueError: as `Parts` does, and if other processes of the run have found other shards.
        """
        if self.trainer is not None:
            found = (read_index(folder) or {}).get("data_hash")
            of_rank_0 = self.trainer.strategy.broadcast(found)
            if found != of_rank_0:
                raise ValueError(
                    f"{folder} has data hash {found}, but the first process reads {of_rank_0}: data differs between "
                    "machines, or has changed while the run was starting"
                )
        streamed = STREAM in (read_index(folder) or {}) and split == "train"
        return StreamedParts(folder, self.config) if streamed else Parts(folder, split)

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self.train_set.close()

    def _loader(self, dataset: Batches, batches: Any) -> DataLoader[Batch]:
        dataset.order = self._order
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=_identity,
            num_workers=self.config.data.workers,
            worker_init_fn=_leave_group,
            persistent_workers=self.config.data.workers > 0,
            pin_memory=uses_gpu(self.config.trainer.accelerator),  # for asynchronous copies
        )

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed, "order": self._order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._consumed, self._order = int(state_dict["consumed"]), int(state_dict.get("order", FORMER))
        if not FORMER <= self._order <= CURRENT:
            raise ValueError(f"the checkpoint has the data order of version {self._order}, which a newer t2i_lm wrote")


def make_sampler(
    config: ExperimentConfig, sizes: int | Indices, rank: int = 0, world: int = 1, version: int = CURRENT
) -> IndexSampler:
    """The training order of an experiment.

    Args:
        config: the experiment.
        sizes: training samples, in all or of each part.
        rank: this process.
        world: number of processes.
        version: of the order.
    """
    data, size = config.data, int(np.sum(sizes))
    if version == FORMER:
        order: Order = FormerOrder(size, config.seed)
    elif data.shuffle_parts is None:
        order = ShuffledOrder(size, config.seed)
    else:
        order = PartsOrder(np.atleast_1d(sizes), config.seed, data.shuffle_parts, data.batch_size)
    accumulate = config.trainer.accumulate_grad_batches
    sampler = IndexSampler(order, data.batch_size, config.trainer.max_steps, rank, world, accumulate, data.replayed)
    if version == CURRENT and (data.replayed or config.align.shuffle_pairs):
        sampler.mark = b"order 3"  # of the text beside the draws, which they do not tell
    return sampler


class PairDataModule(BatchDataModule):
    """Prepared caption-image pairs (text-to-image, unconditional)."""

    def __init__(self, config: ExperimentConfig, folder: Path, layout: Layout | ImageLayout) -> None:
        super().__init__(config, validation_splits(folder))
        self.folder, self.layout = folder, layout
        self.ratio: TextRatio | None = None
        if config.data.text_ratio is not None and isinstance(layout, Layout):
            index = read_index(folder) or {}
            lengths = {int(length): n for length, n in index["splits"]["train"]["caption_tokens"].items()}
            ratio, budget = config.data.text_ratio, layout.text_budget
            self.ratio = TextRatio(ratio, layout.image_tokens, budget, lengths, config.seed)

    def setup(self, stage: str) -> None:
        """Opens the shards; a part is verified when it is first read."""
        data, seed = self.config.data, self.config.seed
        multiple, dropout = data.pad_to_multiple_of, data.caption_dropout
        train = self.open(self.folder, "train")
        self.train_set = PairBatches(train, self.layout, data.captions, seed, multiple, dropout, self.ratio)
        self.val_sets = {
            split: PairBatches(self.open(self.folder, split), self.layout, "first", seed, multiple).cut(self.val_size)
            for split in self.validation_splits
        }


class TextDataModule(BatchDataModule):
    """Prepared text (pre-training of a backbone)."""

    def __init__(self, config: ExperimentConfig, folder: Path) -> None:
        super().__init__(config)
        self.folder = folder

    def setup(self, stage: str) -> None:
        """Memory-maps the shards and checks their hashes; selects `train_size` and `val_size` rows."""
        data = self.config.data
        train, held_out = self.open(self.folder, "train"), self.open(self.folder, "val")
        self.train_set = TextBatches(evenly_spaced(train.dataset(), data.train_size), train)
        self.val_sets = {"val": TextBatches(evenly_spaced(held_out.dataset(), data.val_size), held_out)}


def evenly_spaced(split: datasets.Dataset, size: int | None) -> datasets.Dataset:
    """`size` evenly spaced rows, so that every document has its share; all rows if `size` is None or larger."""
    if size is None or size >= len(split):
        return split
    return split.select(evenly_spaced_indices(len(split), size))

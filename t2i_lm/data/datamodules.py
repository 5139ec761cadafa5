"""LightningDataModules over prepared token shards.

The chain: `prepare` writes shards -> `open_split` maps them -> `IndexSampler` draws (epoch, index) pairs ->
`__getitems__` gathers a micro-batch in one read -> the batch dict that the modules expect. Nothing in it holds
state but the sampler's one integer, which is derived from the optimizer steps taken.
"""

from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.pairs import CaptionedSource, RejectedPairError, center_crop
from t2i_lm.data.sampler import Draw, IndexSampler
from t2i_lm.data.shards.columns import PairColumns
from t2i_lm.data.shards.format import choose_caption, leaves_out_caption, open_split
from t2i_lm.data.shards.tokenize import stack_images
from t2i_lm.data.sources import open_sized
from t2i_lm.runtime.devices import uses_gpu
from t2i_lm.tokenizers.layout import ImageLayout, IntArray, Layout

# `ids_BT` int64, `samples` int, `tokens_nominal` int (positions), `tokens_real` 0-d int64 (pads excluded).
Batch = dict[str, Any]


class Batches(Dataset[Batch]):
    """A sized dataset that gathers a whole batch at once."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """The batch of (epoch, index) draws."""
        raise NotImplementedError


class CaptionedIds(Batches):
    """Prepared caption-image pairs; subclasses say what a batch of them looks like."""

    def __init__(self, split: datasets.Dataset, captions: str, seed: int) -> None:
        self.captions, self.seed = captions, seed
        self._columns = PairColumns(split)
        # Where every caption is a sample of its own: row and caption of each.
        self._each: np.ndarray[Any, np.dtype[np.int64]] | None = None
        if captions == "all":
            counts = self._columns.caption_counts()
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            self._each = np.stack([np.repeat(np.arange(len(counts)), counts), np.arange(counts.sum()) - starts], axis=1)

    def __len__(self) -> int:
        return len(self._columns if self._each is None else self._each)

    def pairs(self, draws: list[Draw]) -> tuple[list[IntArray], IntArray]:
        """A caption's text ids for each draw, and the image ids (B, N)."""
        indices = [index for _, index in draws]
        rows = indices if self._each is None else self._each[indices, 0].tolist()
        texts = [
            self._columns.caption(row, self._choose(self._columns.count(row), epoch, index))
            for (epoch, index), row in zip(draws, rows, strict=True)
        ]
        return texts, self._columns.images(rows)

    def _choose(self, captions: int, epoch: int, index: int) -> int:
        if self._each is not None:
            return int(self._each[index, 1])
        if self.captions == "random" and captions > 1:
            return choose_caption(captions, self.seed, epoch, index)
        return 0


class PairBatches(CaptionedIds):
    """Caption-image pairs as packed batches: `ids_BT` joint ids and how much they are."""

    def __init__(
        self,
        split: datasets.Dataset,
        layout: Layout | ImageLayout,
        captions: str,
        seed: int,
        multiple: int,
        dropout: float = 0.0,
    ) -> None:
        """`multiple` is `data.pad_to_multiple_of`, `dropout` the share of captions left empty."""
        super().__init__(split, captions, seed)
        self.layout, self.multiple, self.dropout = layout, multiple, dropout

    def __getitems__(self, draws: list[Draw]) -> Batch:
        texts, image_ids_BN = self.pairs(draws)
        if self.dropout:
            texts = [
                text[:0] if leaves_out_caption(self.dropout, self.seed, *draw) else text
                for text, draw in zip(texts, draws, strict=True)
            ]
        ids_BT = self.layout.pack(texts, image_ids_BN)
        used_B = (ids_BT != self.layout.vocab.pad).sum(dim=1)
        longest = -(-int(used_B.max()) // self.multiple) * self.multiple
        return {
            "ids_BT": ids_BT[:, : min(self.layout.length, longest)],
            "samples": len(draws),
            "tokens_nominal": len(draws) * self.layout.length,
            "tokens_real": used_B.sum(),
        }


class TextBatches(Batches):
    """Rows of consecutive text ids."""

    def __init__(self, split: datasets.Dataset) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        rows = self.split[[index for _, index in draws]]
        ids_BT = torch.from_numpy(np.stack(rows["text_ids"]).astype(np.int64))
        tokens = len(draws) * (ids_BT.shape[1] - 1)
        return {
            "ids_BT": ids_BT,
            "samples": len(draws),
            "tokens_nominal": tokens,
            "tokens_real": torch.tensor(tokens),
        }


def _same(batch: Any) -> Any:
    return batch


class BatchDataModule(pl.LightningDataModule):
    """Any dataset with `__getitems__(draws) -> batch`, in the order of `IndexSampler`.

    Attributes:
        train_set, val_set: the datasets, opened in `setup`.
        sampler: the training order; its `consumed` is the whole state.
    """

    train_set: Batches
    val_set: Batches

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__()
        self.config = config
        self._consumed = 0

    @property
    def consumed(self) -> int:
        """Samples trained on so far, over all ranks."""
        return int(self.trainer.global_step) * self.config.data.batch_size if self.trainer else self._consumed

    def train_dataloader(self) -> DataLoader[Batch]:
        """The rest of the run as one sized loader."""
        assert self.trainer is not None
        sampler = make_sampler(
            self.config,
            len(self.train_set),
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        sampler.consumed = self._consumed
        return self._loader(self.train_set, sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation set, each sample once over all ranks."""
        assert self.trainer is not None
        size: int = len(self.val_set)
        mine = range(self.trainer.global_rank, size, self.trainer.world_size)
        micro = self.config.micro_batch
        batches = [[(0, index) for index in mine[start : start + micro]] for start in range(0, len(mine), micro)]
        return self._loader(self.val_set, batches)

    def _loader(self, dataset: Batches, batches: Any) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=_same,
            num_workers=self.config.data.workers,
            persistent_workers=self.config.data.workers > 0,
            pin_memory=uses_gpu(self.config.trainer.accelerator),  # so that the host need not wait for a copy
        )

    def state_dict(self) -> dict[str, Any]:
        """The one integer, the same on every rank."""
        return {"consumed": self.consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after the samples consumed."""
        self._consumed = int(state_dict["consumed"])


def make_sampler(config: ExperimentConfig, size: int, rank: int = 0, world: int = 1) -> IndexSampler:
    """The training order of an experiment over `size` samples."""
    return IndexSampler(
        size,
        config.data.batch_size,
        config.trainer.max_steps,
        config.seed,
        rank,
        world,
        config.trainer.accumulate_grad_batches,
        config.data.replayed,
    )


class PairDataModule(BatchDataModule):
    """Prepared caption-image pairs (text-to-image)."""

    def __init__(self, config: ExperimentConfig, folder: Path, layout: Layout | ImageLayout) -> None:
        super().__init__(config)
        self.folder, self.layout = folder, layout

    def setup(self, stage: str) -> None:
        """Maps the shards, checking their hashes."""
        data, seed = self.config.data, self.config.seed
        multiple, dropout = data.pad_to_multiple_of, data.caption_dropout
        train = open_split(self.folder, "train")
        self.train_set = PairBatches(train, self.layout, data.captions, seed, multiple, dropout)
        self.val_set = PairBatches(open_split(self.folder, "val"), self.layout, "first", seed, multiple)


class TextDataModule(BatchDataModule):
    """Prepared text (pre-training a backbone)."""

    def __init__(self, config: ExperimentConfig, folder: Path) -> None:
        super().__init__(config)
        self.folder = folder

    def setup(self, stage: str) -> None:
        """Maps the shards, checking their hashes; of each split the rows that the config asks for."""
        data = self.config.data
        self.train_set = TextBatches(spread(open_split(self.folder, "train"), data.train_size))
        self.val_set = TextBatches(spread(open_split(self.folder, "val"), data.val_size))


def spread(split: datasets.Dataset, size: int | None) -> datasets.Dataset:
    """`size` rows at even distances, so that every document has its share; all where `size` is null or larger."""
    if size is None or size >= len(split):
        return split
    return split.select([row * len(split) // size for row in range(size)])


class ImageBatches(Batches):
    """Images of a source as `images_BCHW` uint8; an unreadable one is replaced by the next that can be read."""

    def __init__(self, source: CaptionedSource, image_size: int) -> None:
        self.source, self.image_size = source, image_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        images_BCHW = stack_images([self._image(index) for _, index in draws])
        return {"images_BCHW": images_BCHW, "samples": len(draws)}

    def _image(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        for step in range(MAX_CONSECUTIVE_REJECTS):
            try:
                return center_crop(self.source[(index + step) % len(self.source)].image, self.image_size)
            except RejectedPairError as reject:
                last = reject
        raise ValueError(f"{MAX_CONSECUTIVE_REJECTS} images in a row cannot be read; the last: {last}")


# Unreadable images in a row after which the source is taken to be broken.
MAX_CONSECUTIVE_REJECTS = 100


class ImageDataModule(BatchDataModule):
    """Images alone, straight from the source (training an image tokenizer)."""

    def setup(self, stage: str) -> None:
        """Opens the source."""
        size = self.config.image_tokenizer.size
        self.train_set = ImageBatches(open_sized(self.config.data, "train", size), size)
        self.val_set = ImageBatches(open_sized(self.config.data, "val", size), size)

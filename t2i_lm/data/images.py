"""Images of a source, without preparation, for the training of an image tokenizer."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.datamodules import Batch, BatchDataModule, Batches
from t2i_lm.data.pairs import CaptionedSource, Pair, RejectedPairError, center_crop
from t2i_lm.data.sampler import Draw
from t2i_lm.data.shards.rejects import Rejects
from t2i_lm.data.shards.tokenize import stack_images
from t2i_lm.data.sources import open_sized, print_notes
from t2i_lm.data.splits import validations_of

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
# Why a sample is unusable: the reason, and the message with its name.
Reject = tuple[str, str]
REJECTED = "rejected"  # key of a batch
# Consecutive unusable images after which a source counts as broken.
MAX_CONSECUTIVE_REJECTS = 100


class ImageBatches(Batches):
    """Images of a source as `images_BCHW` uint8; an unusable image is replaced by the next usable one.

    Attributes:
        rejected: the unusable ones that reading has met, by place.
    """

    def __init__(self, source: CaptionedSource, image_size: int, size: int | None = None) -> None:
        """Of the first `size` samples; None for all."""
        self.source, self.image_size = source, image_size
        self.size = len(source) if size is None else min(len(source), size)
        self.rejected: dict[int, Reject] = {}
        self._new: dict[int, Reject] = {}

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, draws: list[Draw]) -> Batch:
        return self.batch([self.read(index) for _, index in draws])

    def batch(self, read: list[tuple[Pair, Pixels]]) -> Batch:
        """The batch of some pairs and their pixels, with what this process has newly rejected."""
        images_BCHW = stack_images([pixels for _, pixels in read])
        rejected, self._new = self._new, {}
        return {"images_BCHW": images_BCHW, "samples": len(read), REJECTED: rejected}

    def read(self, index: int) -> tuple[Pair, Pixels]:
        """A pair, or the next usable one, and its pixels (H, W, 3) uint8."""
        for step in range(MAX_CONSECUTIVE_REJECTS):
            place = (index + step) % len(self)
            try:
                pair = self.source[place]
                return pair, center_crop(pair.image, self.image_size)
            except RejectedPairError as reject:
                last = reject.reason, str(reject)
                if place not in self.rejected:
                    self.rejected[place] = self._new[place] = last
        raise ValueError(f"{MAX_CONSECUTIVE_REJECTS} consecutive images cannot be used; the last: {last[1]}")


class ImageDataModule(BatchDataModule):
    """Images without captions, read from the source (training of an image tokenizer).

    Each process counts the unusable ones that it meets; more than `data.max_reject_share` of a split end the run.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config, validations_of(config.data))
        self.rejected: dict[str, dict[int, Reject]] = {}

    def setup(self, stage: str) -> None:
        size = self.config.image_tokenizer.size
        sources = {split: open_sized(self.config.data, split, size) for split in ("train", *self.validation_splits)}
        for source in sources.values():
            print_notes(source)
        data = self.config.data
        self.train_set = self.batches(sources["train"], data.train_size, data.captions)
        self.val_sets = {
            split: self.batches(sources[split], data.val_size, "first") for split in self.validation_splits
        }

    def batches(self, source: CaptionedSource, size: int | None, captions: str) -> ImageBatches:
        """The batches of the first `size` samples of a source; `captions` is which of several ones an image has."""
        return ImageBatches(source, self.config.image_tokenizer.size, size)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Counts the unusable samples."""
        assert self.trainer is not None
        split = "train" if self.trainer.training else self.validation_splits[dataloader_idx]
        self.count(split, batch.pop(REJECTED, {}))
        return batch

    def count(self, split: str, rejected: Mapping[int, Reject]) -> None:
        """Adds unusable samples of a split.

        Raises:
            ValueError: if they are more than `data.max_reject_share` of it.
        """
        self.rejected.setdefault(split, {}).update(rejected)
        if rejected and (judged := self._judged(split)).too_many(Counter()):
            raise judged.refusal(Counter(), {}, 0)

    def teardown(self, stage: str) -> None:
        """Prints the unusable samples of every split."""
        super().teardown(stage)
        for split in self.rejected:
            self._judged(split).require_usable()

    def _judged(self, split: str) -> Rejects:
        data, known = self.config.data, self.rejected[split]
        size = len(self.train_set if split == "train" else self.val_sets[split])
        return Rejects(
            data.max_reject_share,
            split,
            size,
            f"data.path={data.path}",
            counts=Counter(reason for reason, _ in known.values()),
            examples=dict(reject for _, reject in sorted(known.items(), reverse=True)),
            rows=size - len(known),
        )

"""Caption-image pairs as bags of tokens, for contrastive alignment (Section 3.2).

Shapes: `B` pairs, `N` image tokens, `L` caption tokens of all pairs.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.datamodules import Batch, BatchDataModule, Batches, CaptionedIds
from t2i_lm.data.order import CURRENT, Indices, former_permutation, keyed
from t2i_lm.data.sampler import Draw
from t2i_lm.data.shards.format import validation_splits
from t2i_lm.data.shards.parts import Parts
from t2i_lm.tokenizers.layout import IntArray


class BagBatches(CaptionedIds):
    """Pairs as unordered bags of tokens, without boundary tokens.

    A batch has `image_ids_BN` (codes), `text_ids_L` and `text_starts_B` (concatenated captions), and `hashes_B2` of
    each caption and image, which identify duplicates across ranks.
    """

    def __init__(self, split: Parts, captions: str, seed: int, shuffle_pairs: bool = False) -> None:
        """With `shuffle_pairs`, each image has the caption of one other sample throughout the run (a control)."""
        super().__init__(split, captions, seed)
        self.shuffle_pairs = shuffle_pairs

    def __getitems__(self, draws: list[Draw]) -> Batch:
        texts, image_ids_BN = self.pairs(draws)
        if self.shuffle_pairs:
            partners = self._partners(np.array([index for _, index in draws]))
            texts, _ = self.pairs([(epoch, index) for (epoch, _), index in zip(draws, partners.tolist(), strict=True)])
        lengths_B = np.array([len(text) for text in texts])
        tokens = int(lengths_B.sum()) + image_ids_BN.size
        hashes = [[content_hash(text), content_hash(image)] for text, image in zip(texts, image_ids_BN, strict=True)]
        return {
            "image_ids_BN": torch.from_numpy(image_ids_BN.astype(np.int64)),
            "text_ids_L": torch.from_numpy(np.concatenate(texts).astype(np.int64)),
            "text_starts_B": torch.from_numpy(np.cumsum(lengths_B) - lengths_B),
            "hashes_B2": torch.tensor(hashes),
            "samples": len(draws),
            "tokens_nominal": tokens,
            "tokens_real": torch.tensor(tokens),
        }

    def _partners(self, indices: Indices) -> Indices:
        """The samples whose captions some images have: all form a single cycle, so that no image keeps its own."""
        if self.order < CURRENT:
            return _former_partners(len(self), self.seed)[indices]
        cycle = keyed(len(self), "partner", self.seed)
        return cycle[(cycle.index(indices) - 1) % len(self)]


@lru_cache(maxsize=4)
def _former_partners(size: int, seed: int) -> Indices:
    """The partner of every sample in former orders."""
    cycle = former_permutation(size, seed, 1)
    partners = np.empty_like(cycle)
    partners[cycle] = np.roll(cycle, 1)
    return partners


def content_hash(ids: IntArray) -> int:
    """A number of 64 bits that tells ids apart."""
    digest = hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


class BagDataModule(BatchDataModule):
    """Prepared pairs as bags. Validation drops the last, incomplete batch: the loss depends on the batch size."""

    def __init__(self, config: ExperimentConfig, folder: Path) -> None:
        super().__init__(config, validation_splits(folder))
        self.folder = folder

    def setup(self, stage: str) -> None:
        """Opens the shards; a part is verified when it is first read.

        Raises:
            ValueError: if a split has fewer pairs than a batch.
        """
        data, seed, shuffle = self.config.data, self.config.seed, self.config.align.shuffle_pairs
        self.train_set = BagBatches(self.open(self.folder, "train"), data.captions, seed, shuffle)
        self.val_sets = {
            split: BagBatches(self.open(self.folder, split), "first", seed, shuffle).cut(self.val_size)
            for split in self.validation_splits
        }
        for name, split in {"train": self.train_set, **self.val_sets}.items():
            if len(split) < data.batch_size:
                raise ValueError(f"data.batch_size={data.batch_size}: the {name} split has only {len(split)} pairs")

    def validation_batches(self, split: Batches) -> list[list[Draw]]:
        """This rank's part of each full global batch of consecutive pairs of a validation split."""
        size, share = self.config.data.batch_size, self.config.micro_batch
        first = self.place[0] * share
        starts = range(first, len(split) - size + first + 1, size)
        return [[(0, index) for index in range(start, start + share)] for start in starts]

"""Images with their captions, for the contrastive term of an image tokenizer.

Shapes: `B` images, `L` caption tokens of all of them.
"""

import numpy as np
import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.alignment import content_hash
from t2i_lm.data.datamodules import Batch, Batches
from t2i_lm.data.images import ImageBatches, ImageDataModule
from t2i_lm.data.pairs import CaptionedSource, Pair
from t2i_lm.data.sampler import Draw, choose_caption
from t2i_lm.tokenizers.base import TextTokenizer


class CaptionedImages(ImageBatches):
    """`ImageBatches` with one caption each, named as by `BagBatches`: `text_ids_L`, `text_starts_B`, `hashes_B2`.

    A batch also has `is_compared`: whether it is part of a full batch over all ranks.
    """

    def __init__(
        self,
        source: CaptionedSource,
        image_size: int,
        text: TextTokenizer,
        captions: str,
        seed: int,
        batch_size: int = 1,
        size: int | None = None,
    ) -> None:
        """As `ImageBatches`.

        Args:
            source: the images.
            image_size: side in pixels.
            text: tokenizer of the captions.
            captions: `first` or `random`, of an image that has several.
            seed: of the random choice.
            batch_size: that of full batches.
            size: the first samples that are used; None for all.
        """
        super().__init__(source, image_size, size)
        self.text, self.captions, self.seed = text, captions, seed
        self.compared = len(self) // batch_size * batch_size  # the first ones, of consecutive batches

    def __getitems__(self, draws: list[Draw]) -> Batch:
        read = [self.read(index) for _, index in draws]
        chosen = [self._caption(pair, *draw) for (pair, _), draw in zip(read, draws, strict=True)]
        texts = [np.array(ids, dtype=np.int64) for ids in self.text.encode_batch(chosen)]
        lengths_B = np.array([len(ids) for ids in texts])
        hashes = [[content_hash(ids), content_hash(pixels)] for ids, (_, pixels) in zip(texts, read, strict=True)]
        return {
            **self.batch(read),
            "text_ids_L": torch.from_numpy(np.concatenate(texts)),
            "text_starts_B": torch.from_numpy(np.cumsum(lengths_B) - lengths_B),
            "hashes_B2": torch.tensor(hashes),
            "is_compared": all(index < self.compared for _, index in draws),
        }

    def _caption(self, pair: Pair, epoch: int, index: int) -> str:
        several = self.captions == "random" and len(pair.captions) > 1
        return pair.captions[choose_caption(len(pair.captions), self.seed, epoch, index) if several else 0]


class CaptionedImageDataModule(ImageDataModule):
    """Images with the text ids of their captions, read from the source.

    Captions are compared in full batches of `data.batch_size` consecutive validation images, however many devices share
    them: their loss depends on the number of candidates. The rest is reconstructed alone.
    """

    def __init__(self, config: ExperimentConfig, text: TextTokenizer) -> None:
        super().__init__(config)
        self.text = text

    def batches(self, source: CaptionedSource, size: int | None, captions: str) -> ImageBatches:
        config = self.config
        image_size, batch_size = config.image_tokenizer.size, config.data.batch_size
        return CaptionedImages(source, image_size, self.text, captions, config.seed, batch_size, size)

    def setup(self, stage: str) -> None:
        """Opens the sources.

        Raises:
            ValueError: if a validation split has fewer images than a batch.
        """
        super().setup(stage)
        size = self.config.data.batch_size
        for name, split in self.val_sets.items():
            if len(split) < size:
                raise ValueError(
                    f"data.batch_size={size}: the {name} split has only {len(split)} images, and captions are compared "
                    "in full batches"
                )

    def validation_batches(self, split: Batches) -> list[list[Draw]]:
        """This rank's part of each full global batch of consecutive images, and then its share of the rest."""
        assert isinstance(split, CaptionedImages)
        (rank, world), size, share = self.place, self.config.data.batch_size, self.config.micro_batch
        starts = range(rank * share, split.compared, size)
        rest = [(0, index) for index in range(split.compared + rank, len(split), world)]
        full = [[(0, index) for index in range(start, start + share)] for start in starts]
        return [*full, *([rest] if rest else [])]

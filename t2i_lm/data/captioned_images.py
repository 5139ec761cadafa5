"""Images with their captions, for the contrastive term of an image tokenizer.

Shapes: `B` images, `L` caption tokens of all of them.
"""

import numpy as np
import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.alignment import content_hash
from t2i_lm.data.datamodules import Batch, ImageBatches, ImageDataModule
from t2i_lm.data.pairs import CaptionedSource, Pair
from t2i_lm.data.sampler import Draw, choose_caption
from t2i_lm.tokenizers.base import TextTokenizer


class CaptionedImages(ImageBatches):
    """`ImageBatches` with one caption each, named as by `BagBatches`: `text_ids_L`, `text_starts_B`, `hashes_B2`."""

    def __init__(self, source: CaptionedSource, image_size: int, text: TextTokenizer, captions: str, seed: int) -> None:
        """`captions` is `first` or `random`, of an image that has several."""
        super().__init__(source, image_size)
        self.text, self.captions, self.seed = text, captions, seed

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
        }

    def _caption(self, pair: Pair, epoch: int, index: int) -> str:
        several = self.captions == "random" and len(pair.captions) > 1
        return pair.captions[choose_caption(len(pair.captions), self.seed, epoch, index) if several else 0]


class CaptionedImageDataModule(ImageDataModule):
    """Images with the text ids of their captions, read from the source."""

    def __init__(self, config: ExperimentConfig, text: TextTokenizer) -> None:
        super().__init__(config)
        self.text = text

    def batches(self, source: CaptionedSource, captions: str) -> ImageBatches:
        return CaptionedImages(source, self.config.image_tokenizer.size, self.text, captions, self.config.seed)

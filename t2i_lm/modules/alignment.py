"""Contrastive alignment of image rows with the text rows of a language model (Section 3.2, Figure 6)."""

from typing import Any

import torch
from torch import Tensor

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.models.contrastive import bag_of_words, clamp_log_scale, initial_log_scale, symmetric_nll
from t2i_lm.models.token_rows import Embedding
from t2i_lm.modules.base import OptimizedModule


class AlignmentModule(OptimizedModule):
    """CLIP's symmetric loss with trainable image rows and temperature; the text rows are frozen.

    The loss is the mean of both directions over all pairs of the global batch. The logarithm of the inverse temperature
    is the parameter, clamped after every step, as in CLIP.
    """

    modalities = ("image_to_text", "text_to_image")

    def __init__(self, embedding: Embedding, config: ExperimentConfig) -> None:
        super().__init__(config)
        assert embedding.image is not None
        embedding.text.requires_grad_(False)
        embedding.special = None  # bags hold no boundary tokens
        self.embedding = embedding
        self.log_scale = initial_log_scale(config.align)

    @property
    def scale(self) -> Tensor:
        """The inverse temperature, which multiplies cosines, 0-d."""
        return self.log_scale.exp()

    def bags(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Normalized bags of images and of captions, each (B, D), in float32."""
        assert self.embedding.image is not None
        image_ids_BN = batch["image_ids_BN"]
        starts_B = torch.arange(len(image_ids_BN), device=image_ids_BN.device) * image_ids_BN.shape[1]
        image_BD = bag_of_words(self.embedding.image, image_ids_BN.flatten(), starts_B)
        return image_BD, bag_of_words(self.embedding.text, batch["text_ids_L"], batch["text_starts_B"])

    def nll(self, batch: dict[str, Any]) -> Tensor:
        """Negative log-likelihood (2, B) of each image's caption and of each caption's image."""
        with torch.autocast(self.device.type, enabled=False):
            image_BD, text_BD = self.bags(batch)
            hashes_B2 = batch["hashes_B2"] if self.config.align.mask_duplicates else None
            return symmetric_nll(image_BD, text_BD, self.scale, hashes_B2)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Mean loss of this rank's pairs; all ranks have equally many, so DDP's average is the global mean."""
        nll_2B = self.nll(batch)
        return {"loss": nll_2B.mean(), **self._report(batch, nll_2B)}

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Sums and counts of one batch, with as many candidates as in training."""
        return self._report(batch, self.nll(batch))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        clamp_log_scale(self.log_scale, self.config.align)

    def scalars(self) -> dict[str, float]:
        """The logit scale, logged beside the loss (Figure 6, right panel)."""
        return {"logit_scale": min(float(self.scale.detach()), self.config.align.logit_scale_max)}

    def _report(self, batch: dict[str, Any], nll_2B: Tensor) -> dict[str, Any]:
        return {
            "nll_sum": nll_2B.detach().double().sum(dim=1),
            "count": torch.full((2,), nll_2B.shape[1], device=nll_2B.device),
            "samples": batch["samples"],
            "tokens_nominal": batch["tokens_nominal"],
            "tokens_real": batch["tokens_real"],
        }

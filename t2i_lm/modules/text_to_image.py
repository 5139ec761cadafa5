"""Text-to-image: each caption and its image as one sequence (Section 2)."""

import torch
from torch import Tensor

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.models.backbone import Backbone
from t2i_lm.modules.base import DecoderModule
from t2i_lm.tokenizers.layout import MODALITIES, PAD, Layout, modality_of_target

# Class of replayed text, after the other modalities; only in runs with replay.
REPLAY = len(MODALITIES)


class TextToImageModule(DecoderModule):
    """The expanded decoder on caption-image sequences, with the loss split by the target's modality.

    With `data.replay_ratio` some sequences are plain text, whose targets are `replay`, not `text`.
    """

    modalities: tuple[str, ...] = MODALITIES

    def __init__(self, decoder: Backbone, config: ExperimentConfig, layout: Layout) -> None:
        super().__init__(decoder, config)
        self.layout = layout
        loss = config.loss
        weights = [loss.text_weight, loss.image_weight, 1.0]
        if config.data.replay_ratio:
            self.modalities = (*MODALITIES, "replay")
            weights.append(loss.replay_weight)
        if loss.weighted:
            self.set_weights(weights)

    def classify(self, target_BT: Tensor) -> tuple[Tensor, Tensor]:
        """text, image or boundary; replay in sequences that do not begin with a boundary. Pads are not valid."""
        modality_BT = modality_of_target(target_BT, self.layout.vocab)
        valid_BT = modality_BT != PAD
        if len(self.modalities) > REPLAY:
            plain_B1 = target_BT[:, :1] < self.layout.vocab.text_size  # in caption-image sequences it is <text>
            modality_BT = torch.where(plain_B1, REPLAY, modality_BT)
        return modality_BT, valid_BT

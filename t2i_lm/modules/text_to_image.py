"""Text-to-image: captions and their pictures as one sequence (Section 2)."""

from torch import Tensor

from t2i_lm.config import ExperimentConfig
from t2i_lm.models.backbone import Backbone
from t2i_lm.modules.base import DecoderModule
from t2i_lm.sequence import MODALITIES, PAD, Layout, modality_of_target


class TextToImageModule(DecoderModule):
    """The expanded decoder on packed caption-image sequences, the loss split by the target's modality."""

    modalities = MODALITIES

    def __init__(self, decoder: Backbone, config: ExperimentConfig, layout: Layout) -> None:
        super().__init__(decoder, config)
        self.layout = layout

    def classify(self, target_BT: Tensor) -> tuple[Tensor, Tensor]:
        """text, image or boundary; pads are masked out."""
        modality_BT = modality_of_target(target_BT, self.layout.vocab)
        return modality_BT, modality_BT != PAD

"""Unconditional image modeling: the value of pre-trained weights for image tokens alone (Section 3.1, Figure 5)."""

from torch import Tensor

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.models.backbone import Backbone
from t2i_lm.modules.base import DecoderModule
from t2i_lm.tokenizers.layout import BOUNDARY, IMAGE, ImageLayout, modality_of_target


class UnconditionalImageModule(DecoderModule):
    """The expanded decoder on images without captions.

    The softmax is over the whole expanded vocabulary, as in the paper, so that text rows are trained down; with
    `loss_rows: image` it is over the image rows, and boundary targets are not counted.
    """

    modalities = ("image", "boundary")

    def __init__(self, decoder: Backbone, config: ExperimentConfig, layout: ImageLayout) -> None:
        super().__init__(decoder, config)
        self.layout = layout
        self.image_rows_only = config.loss_rows == "image"

    def classify(self, target_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Image or boundary; there are no pads."""
        modality_BT = modality_of_target(target_BT, self.layout.vocab)
        valid_BT = modality_BT == IMAGE if self.image_rows_only else modality_BT >= 0
        return (modality_BT == BOUNDARY).long(), valid_BT

    @property
    def nominal_length(self) -> int:
        """The layout's length: sequences have no pads and ignore `data.length`."""
        return self.layout.length

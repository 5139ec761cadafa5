"""Pre-training of a backbone on plain text."""

import torch
from torch import Tensor

from t2i_lm.modules.base import DecoderModule


class TextModule(DecoderModule):
    """Next-token prediction on rows of consecutive text; every target is `text`."""

    modalities = ("text",)

    def classify(self, target_BT: Tensor) -> tuple[Tensor, Tensor]:
        """One class, no pads."""
        return torch.zeros_like(target_BT), torch.ones_like(target_BT, dtype=torch.bool)

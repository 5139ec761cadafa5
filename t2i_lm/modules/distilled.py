"""Distillation from the frozen initial language model, on the text of captions and of replay.

Shapes: `B` batch, `T` positions, `N` text targets, `M` all targets, `D` width, `V` text rows.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_lm.config import ExperimentConfig
from t2i_lm.losses import TokenLoss
from t2i_lm.models.backbone import Backbone
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.sequence import BOUNDARY, IMAGE, Layout


class DistilledModule(TextToImageModule):
    """Text-to-image with `distil.weight` times KL(initial || trained) at every text target.

    Both distributions are over the text rows alone: the initial model knows no others. It reads a caption as the
    beginning of a document, without the boundary tokens that it never saw, and replayed text as it is.
    """

    def __init__(self, decoder: Backbone, config: ExperimentConfig, layout: Layout, document_end: int) -> None:
        """`decoder` as it begins; `document_end` is its text tokenizer's."""
        super().__init__(decoder, config, layout)
        self.document_end = document_end
        # In a list, so that it is no submodule: neither saved, nor counted, nor trained.
        self._teacher = [copy.deepcopy(decoder).requires_grad_(False).eval()]
        self._latest: Tensor | None = None

    def token_loss(
        self, input_BT: Tensor, target_BT: Tensor, class_BT: Tensor, valid_BT: Tensor, weight_N: Tensor | None
    ) -> TokenLoss:
        """As the base module's, the divergence added to `total`; without gradient it would be thrown away."""
        if not torch.is_grad_enabled():
            return super().token_loss(input_BT, target_BT, class_BT, valid_BT, weight_N)
        x_MD = self.decoder.wanted_hidden(input_BT, valid_BT)
        loss: TokenLoss = self.decoder.output(x_MD, target_BT[valid_BT], weight_N=weight_N)
        text_BT = valid_BT & (class_BT != IMAGE) & (class_BT != BOUNDARY)
        divergence_N = self.divergence(x_MD[text_BT[valid_BT]], input_BT, text_BT)
        self._latest = divergence_N.detach().sum() / max(1, len(divergence_N))
        return loss._replace(total=loss.total + self.config.distil.weight * divergence_N.sum())

    def divergence(self, x_ND: Tensor, input_BT: Tensor, text_BT: Tensor) -> Tensor:
        """KL(initial || trained) (N,) in nats where `text_BT` holds, with gradient to the hidden states there."""
        text = self.decoder.output.text
        teacher = self._teacher[0].to(text.device)
        rows_N, places_N = text_BT.nonzero(as_tuple=True)
        # A caption without <doc>, and the end of a document for <text>: the initial model is one position behind.
        captions_B = input_BT[:, 0] >= self.layout.vocab.text_size
        shifted_BT = torch.where(captions_B[:, None], input_BT.roll(-1, dims=1), input_BT)
        shifted_BT = shifted_BT.masked_fill(shifted_BT >= self.layout.vocab.text_size, self.document_end)
        places_of_teacher_N = places_N - captions_B[rows_N].long()
        with torch.no_grad():
            used = int(places_of_teacher_N.max()) + 1 if len(places_N) else 1
            teacher_ND = teacher.hidden(shifted_BT[:, :used])[rows_N, places_of_teacher_N]
            log_teacher_NV = F.linear(teacher_ND, teacher.output.text).float().log_softmax(dim=1)
        log_own_NV = F.linear(x_ND, text).float().log_softmax(dim=1)
        return (log_teacher_NV.exp() * (log_teacher_NV - log_own_NV)).sum(dim=1)

    def scalars(self) -> dict[str, Any]:
        """The last micro-batch's mean divergence, nats a text target (this rank's)."""
        return {} if self._latest is None else {"distil_kl": float(self._latest)}

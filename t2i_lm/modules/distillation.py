"""Distillation from the frozen initial language model, on the text of captions and of replay.

Shapes: `B` batch, `T` positions, `N` text targets, `M` all targets, `D` width, `V` text rows, `U` positions of the
initial model's input.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.cross_entropy import TokenLoss
from t2i_lm.modules.base import Targets
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.tokenizers.layout import BOUNDARY, IMAGE, Layout


class TextTargets(NamedTuple):
    """The N text targets of a batch, and where both models predict them.

    Attributes:
        among_N: their indices among the M targets.
        length: U, the shortest input of the initial model that covers all of them.
        place_N: their indices in the initial model's flattened (B, U) output.
    """

    among_N: Tensor
    length: int
    place_N: Tensor


class DistilledModule(TextToImageModule):
    """Text-to-image plus `distil.weight` times KL(initial || trained) at every text target.

    Both distributions are over the text rows alone, the only ones that the initial model has. Its input is the
    caption as the beginning of a document, without the boundary tokens, which it was not trained on; replayed text is
    unchanged.
    """

    def __init__(self, decoder: Backbone, config: ExperimentConfig, layout: Layout, document_start: int) -> None:
        """`decoder` has its initial weights; `document_start` is the id that it reads a document behind."""
        super().__init__(decoder, config, layout)
        self.document_start = document_start
        # In a list, so that it is not a submodule: neither saved nor counted nor trained.
        self._teacher = [copy.deepcopy(decoder).requires_grad_(False).eval()]
        self._latest: Tensor | None = None

    def find_targets(self, ids_BT: Tensor) -> Targets:
        """The base module's targets, with `text` set."""
        targets = super().find_targets(ids_BT)
        T = ids_BT.shape[1] - 1
        among_N = ((targets.class_N != IMAGE) & (targets.class_N != BOUNDARY)).nonzero().squeeze(1)
        place_N = targets.indices.index_M[among_N]
        row_N, position_N = place_N // T, place_N % T
        # <doc> and <text> at a caption's start are one token to the initial model, so its positions are one less.
        position_N = position_N - self._captions(ids_BT)[row_N].long()
        length = int(position_N.max()) + 1 if len(position_N) else 1
        return targets._replace(text=TextTargets(among_N, length, row_N * length + position_N))

    def token_loss(self, input_BT: Tensor, target_BT: Tensor, targets: Targets, weight_N: Tensor | None) -> TokenLoss:
        """The base module's loss, the divergence added to `total` (only with gradient: validation ignores `total`)."""
        if not torch.is_grad_enabled():
            return super().token_loss(input_BT, target_BT, targets, weight_N)
        x_MD = self.decoder.hidden_at(input_BT, targets.indices)
        target_M = targets.indices.select(target_BT)
        loss = self.decoder.output.loss(x_MD, target_M, weight_N=weight_N, backend=self.loss_backend)
        text: TextTargets = targets.text
        divergence_N = self.divergence(x_MD.index_select(0, text.among_N), input_BT, text)
        self._latest = divergence_N.detach().sum() / max(1, len(divergence_N))
        return loss._replace(total=loss.total + self.config.distil.weight * divergence_N.sum())

    def divergence(self, x_ND: Tensor, input_BT: Tensor, text: TextTargets) -> Tensor:
        """KL(initial || trained) (N,) in nats at the text targets, differentiable in their hidden states `x_ND`."""
        rows_VD = self.decoder.output.text
        teacher = self._teacher[0].to(rows_VD.device)
        # Drop <doc>, and replace <text> by what stands in front of a document.
        shifted_BT = torch.where(self._captions(input_BT)[:, None], input_BT.roll(-1, dims=1), input_BT)
        shifted_BT = shifted_BT.masked_fill(shifted_BT >= self.layout.vocab.text_size, self.document_start)
        with torch.no_grad():
            teacher_ND = teacher.hidden(shifted_BT[:, : text.length]).flatten(0, 1).index_select(0, text.place_N)
            log_teacher_NV = F.linear(teacher_ND, teacher.output.text, teacher.output.bias).float().log_softmax(dim=1)
        log_own_NV = F.linear(x_ND, rows_VD, self.decoder.output.bias).float().log_softmax(dim=1)
        return (log_teacher_NV.exp() * (log_teacher_NV - log_own_NV)).sum(dim=1)

    def _captions(self, ids_BT: Tensor) -> Tensor:
        """Mask (B,) of the caption-image sequences: those that begin with a boundary token."""
        return ids_BT[:, 0] >= self.layout.vocab.text_size

    def scalars(self) -> dict[str, Any]:
        """Mean divergence of this rank's last micro-batch, nats/text target."""
        return {} if self._latest is None else {"distil_kl": float(self._latest)}

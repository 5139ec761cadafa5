"""Distillation from the frozen initial language model, on the text of captions and of replay.

Shapes: `B` batch, `T` positions, `N` text targets, `M` all targets, `D` width, `V` text rows; `U` positions that the
initial model reads.
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
    """The text targets of a batch, where both models' states for them are.

    Attributes:
        among_N: their numbers among the M targets.
        read: U, which is enough for all of them.
        place_N: where the initial model predicts them, in its flattened (B, U) batch.
    """

    among_N: Tensor
    read: int
    place_N: Tensor


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

    def find_targets(self, ids_BT: Tensor) -> Targets:
        """As the base module's, with the `TextTargets` among them."""
        targets = super().find_targets(ids_BT)
        T = ids_BT.shape[1] - 1
        among_N = ((targets.class_N != IMAGE) & (targets.class_N != BOUNDARY)).nonzero().squeeze(1)
        place_N = targets.wanted.index_M[among_N]
        row_N, position_N = place_N // T, place_N % T
        # A caption's first two, <doc> and <text>, are one token to the initial model: it is one position behind.
        position_N = position_N - self._captions(ids_BT)[row_N].long()
        read = int(position_N.max()) + 1 if len(position_N) else 1
        return targets._replace(more=TextTargets(among_N, read, row_N * read + position_N))

    def token_loss(self, input_BT: Tensor, target_BT: Tensor, targets: Targets, weight_N: Tensor | None) -> TokenLoss:
        """As the base module's, the divergence added to `total`; without gradient it would be thrown away."""
        if not torch.is_grad_enabled():
            return super().token_loss(input_BT, target_BT, targets, weight_N)
        x_MD = self.decoder.hidden_at(input_BT, targets.wanted)
        target_M = targets.wanted.select(target_BT)
        loss = self.decoder.output.loss(x_MD, target_M, weight_N=weight_N, backend=self.loss_backend)
        text: TextTargets = targets.more
        divergence_N = self.divergence(x_MD.index_select(0, text.among_N), input_BT, text)
        self._latest = divergence_N.detach().sum() / max(1, len(divergence_N))
        return loss._replace(total=loss.total + self.config.distil.weight * divergence_N.sum())

    def divergence(self, x_ND: Tensor, input_BT: Tensor, text: TextTargets) -> Tensor:
        """KL(initial || trained) (N,) in nats at text targets, with gradient to their hidden states `x_ND`."""
        rows_VD = self.decoder.output.text
        teacher = self._teacher[0].to(rows_VD.device)
        # A caption without <doc>, and the end of a document for <text>.
        shifted_BT = torch.where(self._captions(input_BT)[:, None], input_BT.roll(-1, dims=1), input_BT)
        shifted_BT = shifted_BT.masked_fill(shifted_BT >= self.layout.vocab.text_size, self.document_end)
        with torch.no_grad():
            teacher_ND = teacher.hidden(shifted_BT[:, : text.read]).flatten(0, 1).index_select(0, text.place_N)
            log_teacher_NV = F.linear(teacher_ND, teacher.output.text).float().log_softmax(dim=1)
        log_own_NV = F.linear(x_ND, rows_VD).float().log_softmax(dim=1)
        return (log_teacher_NV.exp() * (log_teacher_NV - log_own_NV)).sum(dim=1)

    def _captions(self, ids_BT: Tensor) -> Tensor:
        """Which sequences (B,) are captions with images: those that begin with a boundary."""
        return ids_BT[:, 0] >= self.layout.vocab.text_size

    def scalars(self) -> dict[str, Any]:
        """The last micro-batch's mean divergence, nats a text target (this rank's)."""
        return {} if self._latest is None else {"distil_kl": float(self._latest)}

"""The embedding and output matrices as row blocks, so that one block can be frozen, decayed or replaced exactly.

Shapes: `B` batch, `T` tokens, `N` targets, `D` width, `V` vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i_lm.models.cross_entropy import TokenLoss, linear_cross_entropy


class TokenRows(nn.Module):
    """A (V, D) matrix in row blocks text | special | image; the last two appear on expansion."""

    BLOCKS = ("text", "special", "image")
    special: nn.Parameter | None
    image: nn.Parameter | None

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.text = nn.Parameter(torch.empty(vocab_size, dim))
        self.register_parameter("special", None)
        self.register_parameter("image", None)

    def matrix(self) -> Tensor:
        """All rows (V, D) in joint-id order."""
        blocks = [rows for name in self.BLOCKS if (rows := getattr(self, name)) is not None]
        return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


class Embedding(TokenRows):
    """Joint ids -> rows; with `image_rows_only`, image codes -> image rows, for which no matrix is put together."""

    def forward(self, ids_BT: Tensor, image_rows_only: bool = False) -> Tensor:
        if image_rows_only:
            assert self.image is not None
            return F.embedding(ids_BT, self.image)
        return F.embedding(ids_BT, self.matrix())


class Output(TokenRows):
    """Hidden states (..., D) -> logits (..., V) in float32, or the loss of given targets.

    The loss lives in this forward because under FSDP2 the rows are whole only here.

    Attributes:
        loss: what computes the loss, of `losses.BACKENDS`.
        z_loss: factor of each target's squared logsumexp in the loss's `total`.
    """

    loss: Callable[..., TokenLoss] = staticmethod(linear_cross_entropy)
    z_loss = 0.0

    def forward(
        self,
        x: Tensor,
        target_N: Tensor | None = None,
        image_rows_only: bool = False,
        weight_N: Tensor | None = None,
    ) -> Tensor | TokenLoss:
        """Logits, or the loss of targets (joint ids): over all rows, or over the image rows alone."""
        if target_N is None:
            if image_rows_only:
                assert self.image is not None
                return F.linear(x, self.image).float()
            return F.linear(x, self.matrix()).float()
        if image_rows_only:
            assert self.special is not None
            assert self.image is not None
            target_N = target_N - len(self.text) - len(self.special)
            return self.loss(x, self.image, target_N, weight_N, self.z_loss)
        return self.loss(x, self.matrix(), target_N, weight_N, self.z_loss)


def is_new_row(name: str) -> bool:
    """Whether no language model was pre-trained with a parameter: boundary and image rows, adapters."""
    return name.endswith((".special", ".image")) or ".lora_" in name

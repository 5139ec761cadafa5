"""Embedding and output matrices in row blocks, so that a block can be frozen, decayed or replaced exactly.

Shapes: `B` batch, `T` tokens, `N` targets, `D` width, `V` vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i_lm.models.cross_entropy import LossBackend, TokenLoss, linear_cross_entropy
from t2i_lm.models.padded_rows import pad_blocks

# Columns that a bias adds to rows: one used, the rest zeros, because GPUs multiply multiples of eight fastest.
BIAS_COLUMNS = 8


class TokenRows(nn.Module):
    """A (V, D) matrix in row blocks text | special | image; expansion adds the last two."""

    BLOCKS = ("text", "special", "image")
    special: nn.Parameter | None
    image: nn.Parameter | None

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.text = nn.Parameter(torch.empty(vocab_size, dim))
        self.register_parameter("special", None)
        self.register_parameter("image", None)

    def blocks(self) -> list[Tensor]:
        """The row blocks in joint-id order; without expansion, the text rows alone."""
        return [rows for name in self.BLOCKS if (rows := getattr(self, name)) is not None]

    def matrix(self) -> Tensor:
        """All rows (V, D) in joint-id order."""
        return _joined(self.blocks())


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(blocks)) if len(blocks) > 1 else blocks[0]


class Embedding(TokenRows):
    """Joint ids -> rows; if `image_rows_only`, image codes -> image rows, without concatenating the blocks."""

    def forward(self, ids_BT: Tensor, image_rows_only: bool = False) -> Tensor:
        if image_rows_only:
            assert self.image is not None
            return F.embedding(ids_BT, self.image)
        return F.embedding(ids_BT, self.matrix())


class Output(TokenRows):
    """Hidden states -> logits by `forward`, or the loss of targets by `loss`.

    The loss is a method of this module because under FSDP2 the rows are whole only inside its forward methods
    (`fsdp.shard` makes `loss` one of them).

    Attributes:
        bias: of the text rows (V,), of some models of transformers; special and image rows have none.
    """

    bias: nn.Parameter | None

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__(vocab_size, dim)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, image_rows_only: bool = False) -> Tensor:
        """Logits (..., V) float32 of hidden states (..., D); of the image rows alone if `image_rows_only`."""
        if image_rows_only:
            assert self.image is not None
            return _product(x, [self.image])
        return _product(*self.factors(x))

    def factors(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Hidden states (..., D') and row blocks (each of width D') whose products are the logits.

        D' exceeds D if there is a bias.
        """
        blocks = self.blocks()
        if self.bias is None:
            return x, blocks
        zeros = (0, BIAS_COLUMNS - 1)
        biases = [self.bias, *(x.new_zeros(len(block)) for block in blocks[1:])]
        wider = [
            torch.cat([block, F.pad(bias[:, None].to(block.dtype), zeros)], dim=1)
            for block, bias in zip(blocks, biases, strict=True)
        ]
        ones = F.pad(x.new_ones(*x.shape[:-1], 1), zeros)
        return torch.cat([x, ones], dim=-1), wider

    def loss(
        self,
        x_ND: Tensor,
        target_N: Tensor,
        image_rows_only: bool = False,
        weight_N: Tensor | None = None,
        backend: LossBackend = linear_cross_entropy,
    ) -> TokenLoss:
        """Loss of targets (joint ids) over all rows, or over the image rows alone.

        Args:
            x_ND: hidden states.
            target_N: joint ids.
            image_rows_only: restricts the softmax to the image rows; all targets must be image ids.
            weight_N: factor of each target in the loss's `total`; ones by default.
            backend: one of `cross_entropy.BACKENDS`, its options bound.
        """
        if image_rows_only:
            assert self.special is not None
            assert self.image is not None
            target_N = target_N - len(self.text) - len(self.special)
            return backend(x_ND, self.image, target_N, weight_N)
        x_ND, blocks = self.factors(x_ND)
        return backend(x_ND, blocks, target_N, weight_N)


def _product(x: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """Logits (..., V) float32 of hidden states and all rows of the blocks."""
    rows = sum(map(len, blocks))
    return F.linear(x, _joined(pad_blocks(blocks)))[..., :rows].float()


def is_new_row(name: str) -> bool:
    """Whether a parameter is absent from the pre-trained model: special and image rows, adapters."""
    return name.endswith((".special", ".image")) or ".lora_" in name

"""Indices of the target positions, packed batches, and positions sorted by modality.

All are computed on the host before the batch is moved: boolean-mask indexing on a GPU would force a synchronization
every step.

Shapes: `B` sequences, `T` positions of the padded batch, `N` packed tokens, `M` target positions; `1` before `N` where
the layers see all packed tokens as one sequence.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packed(NamedTuple):
    """The tokens of a padded batch that its targets depend on, concatenated.

    Each sequence is cut after its last target: attention is causal, so nothing later matters. A named tuple, as
    `TargetIndex` is.

    Attributes:
        shape: B and T.
        index_N: of each packed token in the flattened batch.
        position_N: of each packed token in its sequence.
        offsets_S: cumulative lengths of the sequences (B + 1), int32, as `varlen_attn` takes them.
        target_M: of each target among the packed tokens, in the batch's order.
    """

    shape: tuple[int, int]
    index_N: Tensor
    position_N: Tensor
    offsets_S: Tensor
    target_M: Tensor

    @classmethod
    def from_mask(cls, mask_BT: Tensor) -> "Packed":
        """The tokens that the positions in the mask depend on; synchronizes if the mask is on a GPU."""
        B, T = mask_BT.shape
        position_T = torch.arange(T, device=mask_BT.device)
        length_B = (mask_BT * (position_T + 1)).amax(dim=1)
        index_N = (position_T < length_B[:, None]).flatten().nonzero().squeeze(1)
        return cls(
            shape=(B, T),
            index_N=index_N,
            position_N=index_N % T,
            offsets_S=F.pad(length_B.cumsum(0), (1, 0)).int(),
            target_M=mask_BT.flatten()[index_N].nonzero().squeeze(1),
        )

    def pack(self, ids_BT: Tensor) -> Tensor:
        """The packed tokens (1, N) of a batch."""
        return ids_BT.flatten().index_select(0, self.index_N)[None]

    def pad(self, x_1HNK: Tensor) -> Tensor:
        """Packed values as a padded batch (B, H, T, K), zero at pads."""
        B, T = self.shape
        x_NHK = x_1HNK[0].transpose(0, 1)
        padded = x_NHK.new_zeros(B * T, *x_NHK.shape[1:]).index_copy(0, self.index_N, x_NHK)
        return padded.view(B, T, *x_NHK.shape[1:]).transpose(1, 2)

    def unpad(self, x_BHTK: Tensor) -> Tensor:
        """The packed values (1, H, N, K) of a padded batch."""
        x_XHK = x_BHTK.transpose(1, 2).flatten(0, 1)
        return x_XHK.index_select(0, self.index_N).transpose(0, 1)[None]


class ModalitySplit(NamedTuple):
    """The tokens of a batch sorted by modality: those of text, then those of images, each in their order.

    A named tuple, as `TargetIndex` is.

    Attributes:
        shape: B and T of the batch; 1 and N of a packed one.
        text: number of text tokens.
        order_N: of each sorted token, its index in the flattened batch.
        place_N: of each token of the flattened batch, its index among the sorted ones.
    """

    shape: tuple[int, int]
    text: int
    order_N: Tensor
    place_N: Tensor

    @classmethod
    def from_ids(cls, ids_BT: Tensor, first_image: int) -> "ModalitySplit":
        """Splits at the id `first_image`; synchronizes if the ids are on a GPU."""
        is_image_N = ids_BT.flatten() >= first_image
        order_N = is_image_N.int().argsort(stable=True)
        B, T = ids_BT.shape
        return cls((B, T), B * T - int(is_image_N.sum()), order_N, order_N.argsort())

    def sort(self, x_BT: Tensor) -> Tensor:
        """The sorted values (1, N, ...) of a (B, T, ...) tensor."""
        return x_BT.flatten(0, 1).index_select(0, self.order_N)[None]

    def unsort(self, x_1N: Tensor) -> Tensor:
        """The values (B, T, ...) of sorted ones."""
        return x_1N[0].index_select(0, self.place_N).view(*self.shape, *x_1N.shape[2:])

    def halves(self, x_1N: Tensor) -> tuple[Tensor, Tensor]:
        """The sorted values of text and of images, as views."""
        return x_1N[:, : self.text], x_1N[:, self.text :]


class TargetIndex(NamedTuple):
    """Indices of the target positions of a batch.

    A named tuple, so that loaders pin it and trainers move it with the rest of a batch.

    Attributes:
        index_M: of each target position in the flattened batch, ascending, int64.
        packed: the tokens to compute, if the model packs.
        split: the tokens to compute by modality, if the model has modality experts.
    """

    index_M: Tensor
    packed: Packed | None = None
    split: ModalitySplit | None = None

    @classmethod
    def from_mask(cls, mask_BT: Tensor, pack: bool = False) -> "TargetIndex":
        """The positions in the mask; synchronizes if the mask is on a GPU."""
        packed = Packed.from_mask(mask_BT) if pack else None
        return cls(mask_BT.flatten().nonzero().squeeze(1), packed)

    def select(self, x_BT: Tensor) -> Tensor:
        """The values (M, ...) of a (B, T, ...) tensor at the target positions."""
        return x_BT.flatten(0, 1).index_select(0, self.index_M)

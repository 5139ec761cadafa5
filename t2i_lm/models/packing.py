"""Target positions as indices, and packed batches.

Both are computed on the host before the batch is moved: boolean-mask indexing on a GPU would force a synchronization
every step.

Shapes: `B` sequences, `T` positions of the padded batch, `N` packed tokens, `M` target positions; `1` before `N` where
all packed tokens are one sequence to the layers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Packed(NamedTuple):
    """Which tokens of a batch are computed: of each sequence those up to the last whose state is wanted.

    What comes later cannot change these, since attention is causal. A named tuple, as `TargetIndex` is.

    Attributes:
        shape: B and T.
        place_N: of each packed token in the flattened batch.
        position_N: in its sequence.
        ends_S: where each sequence begins, and the end of the last (B + 1), int32.
        wanted_M: packed tokens whose states are wanted, in the batch's order.
    """

    shape: tuple[int, int]
    place_N: Tensor
    position_N: Tensor
    ends_S: Tensor
    wanted_M: Tensor

    @classmethod
    def up_to_last(cls, wanted_BT: Tensor) -> "Packed":
        """All that the states depend on which are wanted; of a mask on a GPU, waits for it."""
        B, T = wanted_BT.shape
        position_T = torch.arange(T, device=wanted_BT.device)
        length_B = (wanted_BT * (position_T + 1)).amax(dim=1)
        place_N = (position_T < length_B[:, None]).flatten().nonzero().squeeze(1)
        return cls(
            shape=(B, T),
            place_N=place_N,
            position_N=place_N % T,
            ends_S=F.pad(length_B.cumsum(0), (1, 0)).int(),
            wanted_M=wanted_BT.flatten()[place_N].nonzero().squeeze(1),
        )

    def pack(self, ids_BT: Tensor) -> Tensor:
        """The packed tokens (1, N) of a batch."""
        return ids_BT.flatten().index_select(0, self.place_N)[None]

    def pad(self, x_1HNK: Tensor) -> Tensor:
        """Packed values as a batch (B, H, T, K), with zeros behind the ends."""
        B, T = self.shape
        x_NHK = x_1HNK[0].transpose(0, 1)
        padded = x_NHK.new_zeros(B * T, *x_NHK.shape[1:]).index_copy(0, self.place_N, x_NHK)
        return padded.view(B, T, *x_NHK.shape[1:]).transpose(1, 2)

    def unpad(self, x_BHTK: Tensor) -> Tensor:
        """The packed part (1, H, N, K) of a batch."""
        x_XHK = x_BHTK.transpose(1, 2).flatten(0, 1)
        return x_XHK.index_select(0, self.place_N).transpose(0, 1)[None]


class TargetIndex(NamedTuple):
    """Places of a batch, found where its ids are: on the host, before the batch is moved.

    A named tuple, so that loaders pin it and trainers move it with the rest of a batch.

    Attributes:
        place_M: of each wanted position in the flattened batch, ascending, int64.
        packed: what is computed for them, where the model packs.
    """

    place_M: Tensor
    packed: Packed | None = None

    @classmethod
    def where(cls, wanted_BT: Tensor, pack: bool = False) -> "TargetIndex":
        """Those where the mask holds; of a mask on a GPU, waits for it."""
        packed = Packed.up_to_last(wanted_BT) if pack else None
        return cls(wanted_BT.flatten().nonzero().squeeze(1), packed)

    def of(self, x_BT: Tensor) -> Tensor:
        """What a (B, T, ...) tensor holds there, (M, ...)."""
        return x_BT.flatten(0, 1).index_select(0, self.place_M)

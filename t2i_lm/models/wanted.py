"""Which positions of a batch are wanted, as numbers: a mask's count is data, for which the host waits for the device.

Shapes: `B` sequences, `T` positions, `M` wanted positions.
"""

from typing import NamedTuple

from torch import Tensor

from t2i_lm.models.packing import Packed


class Wanted(NamedTuple):
    """Places of a batch, found where its ids are: on the host, before the batch is moved.

    A named tuple, so that loaders pin it and trainers move it with the rest of a batch.

    Attributes:
        place_M: of each wanted position in the flattened batch, ascending, int64.
        packed: what is computed for them, where the model packs.
    """

    place_M: Tensor
    packed: Packed | None = None

    @classmethod
    def where(cls, wanted_BT: Tensor, pack: bool = False) -> "Wanted":
        """Those where the mask holds; of a mask on a GPU, waits for it."""
        packed = Packed.up_to_last(wanted_BT) if pack else None
        return cls(wanted_BT.flatten().nonzero().squeeze(1), packed)

    def of(self, x_BT: Tensor) -> Tensor:
        """What a (B, T, ...) tensor holds there, (M, ...)."""
        return x_BT.flatten(0, 1).index_select(0, self.place_M)

"""The static key-value cache of generation.

Shapes: `B` sequences, `H` heads, `T` columns, `K` head dim, `S` positions written at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# What attention needs of a store: keys and values (B, H, T, K) to attend to, and which columns count (None: all).
Extended = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Window:
    """What one step reads and writes: the columns of a cache up to the new one.

    Where that is depends on tensors and their shapes alone, so that one compiled graph serves all steps.

    Attributes:
        keys, values: of each layer (B, H, T, K), views; the last column is written.
        position_B: position of the new token in each sequence.
        mask_B11T: the columns that hold something after the step; None where all do.
    """

    keys: list[Tensor]
    values: list[Tensor]
    position_B: Tensor
    mask_B11T: Tensor | None

    def extend(self, layer: int, k_BH1K: Tensor, v_BH1K: Tensor) -> Extended:
        """Writes one position and returns all."""
        k_BHTK, v_BHTK = self.keys[layer], self.values[layer]
        k_BHTK[:, :, -1:], v_BHTK[:, :, -1:] = k_BH1K, v_BH1K
        return k_BHTK, v_BHTK, self.mask_B11T


class KVCache:
    """Keys and values of every layer for `length` columns, filled from the left, all sequences alike.

    Attributes:
        filled: columns in use.
        first_B: of each sequence the first column in use; other than 0 where prompts differ in length.
    """

    def __init__(self, layers: int, batch: int, heads: int, length: int, head_dim: int, like: Tensor) -> None:
        """Dtype and device are those of `like`."""
        shape = (batch, heads, length, head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]
        self.filled = 0
        self.first_B = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self._ragged = False
        self._columns_T = torch.arange(length, device=like.device)

    def extend(self, layer: int, k_BHSK: Tensor, v_BHSK: Tensor) -> Extended:
        """Writes the prompts of an empty cache and returns them; `prefilled` ends it."""
        assert self.filled == 0
        length = k_BHSK.shape[2]
        self.keys[layer][:, :, :length], self.values[layer][:, :, :length] = k_BHSK, v_BHSK
        return k_BHSK, v_BHSK, None

    def prefilled(self, length: int) -> None:
        """Says that all layers have written the prompts."""
        self.filled = length

    def place(self, rows: list[int], part: "KVCache", end: int) -> None:
        """Copies what another cache holds into some sequences, so that it ends before column `end`."""
        start = end - part.filled
        for whole, other in zip([*self.keys, *self.values], [*part.keys, *part.values], strict=True):
            whole[rows, :, start:end] = other[:, :, : part.filled]
        self.first_B[rows] = start
        self.filled, self._ragged = end, True

    def next_window(self) -> Window:
        """The window of the next step, whose column then counts as filled."""
        self.filled += 1
        end = self.filled
        columns_T = self._columns_T[:end]
        mask_B11T = (columns_T >= self.first_B[:, None])[:, None, None] if self._ragged else None
        return Window(
            [whole[:, :, :end] for whole in self.keys],
            [whole[:, :, :end] for whole in self.values],
            columns_T[-1] - self.first_B,
            mask_B11T,
        )

"""Static key-value cache for generation.

Shapes: `B` sequences, `H` heads, `T` columns, `L` of them in all, `K` head dim,
`S` positions written at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from t2i_lm.models.cuda_graph import StepGraphs

# Columns that no window has. A window of all columns would be contiguous and compile once more. Eight keep alignment.
SPARE = 8
# Keys and values (B, H, T, K) to attend to, and the mask added to scores (None: 0).
Extended = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Prompts:
    """One layer of an empty cache, into which prompts are written.

    Attributes:
        keys_BHLK, values_BHLK: all columns.
    """

    keys_BHLK: Tensor
    values_BHLK: Tensor

    def extend(self, k_BHSK: Tensor, v_BHSK: Tensor) -> Extended:
        """Writes the prompts and returns them."""
        length = k_BHSK.shape[2]
        self.keys_BHLK[:, :, :length], self.values_BHLK[:, :, :length] = k_BHSK, v_BHSK
        return k_BHSK, v_BHSK, None


@dataclass(frozen=True, eq=False)
class Columns:
    """One layer of a window.

    Attributes:
        keys_BHTK, values_BHTK: views of the cache, which the next step changes.
        column_1: the column to write; None for the last.
        mask_B11T: 0 at the columns filled after the step, else minus infinity; None if all are filled.
    """

    keys_BHTK: Tensor
    values_BHTK: Tensor
    column_1: Tensor | None
    mask_B11T: Tensor | None

    def extend(self, k_BH1K: Tensor, v_BH1K: Tensor) -> Extended:
        """Writes one position and returns all of them."""
        if self.column_1 is None:
            self.keys_BHTK[:, :, -1:], self.values_BHTK[:, :, -1:] = k_BH1K, v_BH1K
        else:
            self.keys_BHTK.index_copy_(2, self.column_1, k_BH1K)
            self.values_BHTK.index_copy_(2, self.column_1, v_BH1K)
        return self.keys_BHTK, self.values_BHTK, self.mask_B11T


@dataclass(frozen=True, eq=False)
class Window:
    """The first columns of a cache, which one step reads and writes.

    A step depends on tensors and their shapes alone, and every layer on its own columns alone, so that one compiled
    block serves all layers and steps.

    Attributes:
        layers: columns of each layer.
        position_B: position of the new token in each sequence.
    """

    layers: list[Columns]
    position_B: Tensor


class KVCache:
    """Keys and values of every layer, filled from the left, in the same columns for all sequences.

    A step attends to the filled columns, rounded up to a multiple of `bucket`. With 1 it reads no more than needed,
    but every step has other shapes. Within a larger bucket only tensor values change, so that one CUDA graph serves
    all its steps.

    Attributes:
        filled: columns in use.
        graphs: CUDA graphs of the steps, with buckets on CUDA.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, like: Tensor, bucket: int = 1) -> None:
        """Dtype and device are those of `like`. No memory is allocated before `reset`."""
        self.bucket, self.filled = bucket, 0
        self.graphs: StepGraphs | None = None
        self._layers, self._heads, self._head_dim, self._like = layers, heads, head_dim, like
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._windows: dict[int, Window] = {}

    def reset(self, batch: int, length: int) -> None:
        """Empties the cache for `batch` sequences of up to `length` columns; keeps memory and graphs of equal size."""
        length = self._rounded(length) + (SPARE if self.bucket > 1 else 0)
        shape = (batch, self._heads, length, self._head_dim)
        if not self.keys or self.keys[0].shape != shape:
            self.keys, self.values, self._windows, self.graphs = [], [], {}, None  # freed before the allocation
            self.keys = [self._like.new_zeros(shape) for _ in range(self._layers)]
            self.values = [self._like.new_zeros(shape) for _ in range(self._layers)]
            self._mask_B11L = self._like.new_empty(batch, 1, 1, length)
            self._position_B = torch.empty(batch, dtype=torch.int64, device=self._like.device)
            self._column_1 = torch.empty(1, dtype=torch.int64, device=self._like.device)
            if self.bucket > 1 and self._like.is_cuda:
                self.graphs = StepGraphs()
        self.filled, self._ragged = 0, False
        self._mask_B11L.fill_(float("-inf"))

    def _rounded(self, columns: int) -> int:
        return -(-columns // self.bucket) * self.bucket

    def prompts(self) -> list[Prompts]:
        """Each layer of an empty cache; `prefilled` follows the last layer's prompts."""
        assert self.filled == 0
        return [Prompts(keys, values) for keys, values in zip(self.keys, self.values, strict=True)]

    def prefilled(self, length: int) -> None:
        """Marks the prompts as written, in all layers."""
        self.filled = length
        self._position_B.fill_(length - 1)
        self._mask_B11L[..., :length].zero_()

    def place(self, rows_R: Tensor, part: "KVCache", end: int) -> None:
        """Copies another cache into the sequences `rows_R`, so that it ends before column `end`."""
        start = end - part.filled
        for whole, other in zip([*self.keys, *self.values], [*part.keys, *part.values], strict=True):
            whole[rows_R, :, start:end] = other[:, :, : part.filled]
        self._position_B[rows_R] = part.filled - 1
        self._mask_B11L[rows_R, :, :, start:end] = 0
        self.filled, self._ragged = end, True

    def next_window(self) -> Window:
        """The window of the next step, whose column it marks as filled; within a bucket always the same object."""
        column, self.filled = self.filled, self.filled + 1
        self._column_1.fill_(column)
        self._position_B.add_(1)
        self._mask_B11L[..., column].zero_()
        end = self._rounded(self.filled)
        if end in self._windows:
            return self._windows[end]
        fixed = self.bucket > 1
        column_1 = self._column_1 if fixed else None
        mask_B11T = self._mask_B11L[..., :end] if fixed or self._ragged else None
        layers = [
            Columns(keys[:, :, :end], values[:, :, :end], column_1, mask_B11T)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]
        window = Window(layers, self._position_B)
        if fixed:
            self._windows[end] = window
        return window

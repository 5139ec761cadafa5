"""A seeded permutation that is computed element by element, without an array of its size."""

import hashlib
from collections.abc import Callable
from math import isqrt
from typing import Any, overload

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_MASK = 2**64 - 1


class Permutation:
    """A bijection of 0, ..., size - 1, a function of (size, seed); O(1) memory and time per element.

    A generalized Feistel network (Black and Rogaway, 2002) over the smallest rectangle of nearly equal sides that holds
    `size` elements; an image outside the range is mapped again until it lies inside, which needs 1 + O(1 / sqrt(size))
    passes on average.

    Attributes:
        size: number of elements, at most 2**62.
    """

    def __init__(self, size: int, seed: int | str | tuple[int | str, ...]) -> None:
        """`seed` is one value or several, such as a run's seed and an epoch.

        Raises:
            ValueError: if the size is negative or above 2**62.
        """
        if not 0 <= size <= 2**62:
            raise ValueError(f"size={size}: expected 0 to 2**62")
        self.size = size
        self._rows = max(1, isqrt(size - 1) + 1) if size else 1
        self._columns = max(1, -(-size // self._rows))
        parts = "/".join(map(str, seed if isinstance(seed, tuple) else (seed,)))
        digests = (hashlib.sha256(f"permutation/{parts}/{number}".encode()).digest() for number in range(_ROUNDS))
        self._keys = [int.from_bytes(digest[:8], "little") for digest in digests]

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> int: ...

    @overload
    def __getitem__(self, index: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]: ...

    def __getitem__(self, index: Any) -> Any:
        """The element at an index, or the elements (int64) at an integer array of indices of any shape.

        Raises:
            IndexError: if an index is negative, or not below `size`.
        """
        return self._walk(index, self._pass)

    @overload
    def index(self, element: int | np.integer[Any]) -> int: ...

    @overload
    def index(self, element: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]: ...

    def index(self, element: Any) -> Any:
        """The index of an element, or those (int64) of an integer array of elements of any shape: the inverse.

        Raises:
            IndexError: if an element is negative, or not below `size`.
        """
        return self._walk(element, self._pass_back)

    def _walk(self, index: Any, step: Callable[[Any], Any]) -> Any:
        """Images inside the range, of an int or an array: a network's image outside it is mapped again."""
        if not isinstance(index, np.ndarray):
            if not 0 <= index < self.size:
                raise IndexError(f"index {index} of a permutation of {self.size}")
            value = step(int(index))
            while value >= self.size:
                value = step(value)
            return value
        if index.size and not (index.min() >= 0 and index.max() < self.size):
            raise IndexError(f"indices {index.min()} to {index.max()} of a permutation of {self.size}")
        values = step(index.astype(np.uint64).ravel())
        while (outside := np.flatnonzero(values >= self.size)).size:
            values[outside] = step(values[outside])
        return values.astype(np.int64).reshape(index.shape)

    def _pass(self, value: Any) -> Any:
        """The network's image of an int or of a uint64 array, below `_rows * _columns`."""
        row, column = value // self._columns, value % self._columns
        for number, key in enumerate(self._keys):
            if number % 2:
                column = (column + _mix(row, key) % self._columns) % self._columns
            else:
                row = (row + _mix(column, key) % self._rows) % self._rows
        return row * self._columns + column

    def _pass_back(self, value: Any) -> Any:
        """The inverse of `_pass`."""
        row, column = value // self._columns, value % self._columns
        for number, key in reversed(list(enumerate(self._keys))):
            if number % 2:
                column = (column + self._columns - _mix(row, key) % self._columns) % self._columns
            else:
                row = (row + self._rows - _mix(column, key) % self._rows) % self._rows
        return row * self._columns + column


def _mix(value: Any, key: int) -> Any:
    """The finalizer of splitmix64 on an int or a uint64 array."""
    value = (value + key) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)

"""Statistics of sequences of ids: entropies, the slope of Zipf's law, compression. Entropies are in bits/token.

Shapes: `N` tokens, `K` distinct values.
"""

import lzma
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from t2i_lm.tokenizers.layout import IntArray

# Fewer observations than this per distinct (context, token) on average: even the corrected entropy is far too low.
WELL_SAMPLED = 10.0
# Of Zipf's law: least count of a fitted rank, and number of ranks, spaced evenly in their logarithm.
ZIPF_COUNT, ZIPF_RANKS = 10, 50


@dataclass(frozen=True)
class Entropy:
    """An entropy of tokens given a context, which may be empty.

    Attributes:
        plug_in: from relative frequencies, bits/token; too low on finite samples.
        bits: with the Miller-Madow correction, bits/token; still too low unless `well_sampled`.
        tokens: observations N.
        contexts: distinct contexts.
        pairs: distinct (context, token).
    """

    plug_in: float
    bits: float
    tokens: int
    contexts: int
    pairs: int

    @property
    def well_sampled(self) -> bool:
        """Whether there are at least `WELL_SAMPLED` observations per (context, token)."""
        return self.tokens >= WELL_SAMPLED * self.pairs

    def numbers(self) -> dict[str, Any]:
        """All values by name."""
        return {**vars(self), "well_sampled": self.well_sampled}


@dataclass(frozen=True)
class ZipfFit:
    """Least squares of log frequency against log rank, over `ranks` from 1 spaced evenly in the logarithm."""

    slope: float
    intercept: float
    r2: float
    ranks: int

    def frequency(self, rank: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Fitted count at each rank."""
        fitted: npt.NDArray[Any] = np.exp(self.intercept + self.slope * np.log(rank))
        return fitted


def dense(ids_N: IntArray) -> npt.NDArray[np.int64]:
    """Ids renumbered to 0 ... K - 1, in order."""
    return np.unique(ids_N, return_inverse=True)[1].reshape(-1).astype(np.int64)


def conditional_entropy(tokens_N: IntArray, *context: IntArray) -> Entropy:
    """Entropy of tokens given the ids of their context (each (N,)); without a context, of the tokens alone.

    The correction adds (K - 1) / 2N nats to each entropy of a K-valued variable (Miller, 1955), so that of a
    conditional one (pairs - contexts) / 2N.
    """
    codes_N = np.zeros(len(tokens_N), dtype=np.int64)
    for ids_N in context:
        codes_N = _joined(codes_N, dense(ids_N))
    contexts_K = np.bincount(codes_N)
    pairs_K = np.bincount(_joined(codes_N, dense(tokens_N)))
    plug_in = _bits(pairs_K) - _bits(contexts_K)
    correction = (len(pairs_K) - len(contexts_K)) / (2 * len(tokens_N) * math.log(2))
    return Entropy(plug_in, plug_in + correction, len(tokens_N), len(contexts_K), len(pairs_K))


def _joined(one_N: IntArray, other_N: IntArray) -> npt.NDArray[np.int64]:
    """One dense code per pair of dense codes."""
    return dense(one_N * (int(other_N.max()) + 1) + other_N)


def _bits(counts_K: IntArray) -> float:
    share_K = counts_K / counts_K.sum()
    return float(-(share_K * np.log2(share_K)).sum())


def order_entropies(sequences: Sequence[IntArray], orders: int) -> list[Entropy]:
    """Entropies given the 1 ... `orders` tokens before, all at the same positions: those with `orders` before them.

    Contexts do not cross the ends of sequences. Orders without a position are left out.
    """
    flat_N = np.concatenate(sequences)
    place_N = np.concatenate([np.arange(len(sequence)) for sequence in sequences])
    at_M = np.flatnonzero(place_N >= orders)
    if not len(at_M):
        return []
    before = [flat_N[at_M - back] for back in range(1, orders + 1)]
    return [conditional_entropy(flat_N[at_M], *before[:order]) for order in range(1, orders + 1)]


def neighbor_entropies(images_BHW: IntArray) -> dict[str, Entropy]:
    """Entropies given the left neighbor, the upper one and both, all at positions that have both; empty without."""
    here, left, up = images_BHW[:, 1:, 1:], images_BHW[:, 1:, :-1], images_BHW[:, :-1, 1:]
    if not here.size:
        return {}
    contexts = {"left": (left,), "upper": (up,), "left and upper": (left, up)}
    return {
        name: conditional_entropy(here.ravel(), *(neighbor.ravel() for neighbor in neighbors))
        for name, neighbors in contexts.items()
    }


def zipf_fit(counts_K: IntArray) -> ZipfFit | None:
    """The fit to counts in descending order, over ranks of at least `ZIPF_COUNT`; None with fewer than three."""
    last = int((counts_K >= ZIPF_COUNT).sum())
    if last < 3:
        return None
    ranks = np.unique(np.geomspace(1, last, ZIPF_RANKS).round().astype(int))
    x, y = np.log(ranks), np.log(counts_K[ranks - 1])
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - (intercept + slope * x)) ** 2).sum())
    return ZipfFit(float(slope), float(intercept), 1 - left / spread if spread else 1.0, last)


def compressed_bits(ids_N: IntArray) -> dict[str, float]:
    """Bits/token of zlib (level 9) and lzma on the ids as little-endian integers of 16 bits, or of 32 if needed."""
    packed = ids_N.astype("<u2" if ids_N.max() < 2**16 else "<u4").tobytes()
    sizes = {"zlib": len(zlib.compress(packed, 9)), "lzma": len(lzma.compress(packed))}
    return {name: 8 * size / len(ids_N) for name, size in sizes.items()}

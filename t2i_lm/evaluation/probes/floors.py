"""Floors of held-out text loss: what is reached without knowing the language.

Shapes: `R` rows, `T` ids of a row.
"""

import math

import numpy as np
from torch import Tensor

# Added to the count of every piece (Krichevsky and Trofimov).
ADDED = 0.5


def uniform_nll(size: int) -> float:
    """Loss of a uniform guess among `size` pieces, nats/token."""
    return math.log(size)


def unigram_nll(rows_RT: Tensor, chosen: list[int], size: int, start: int | None = None) -> float:
    """Loss of the text's own frequencies of pieces on some of its rows, nats/token, cross-validated.

    Each row is predicted by the counts of all other rows of the text plus 1/2 per piece.

    Args:
        rows_RT: ids of all rows; the first id of a row is context, not counted.
        chosen: indices of the rows that are scored.
        size: number of pieces.
        start: the beginning of a document, which is no target.
    """
    targets = rows_RT[:, 1:].numpy()
    counted = [row if start is None else row[row != start] for row in targets]
    total_V = np.bincount(np.concatenate(counted), minlength=size).astype(np.float64)
    nats = 0.0
    for number in chosen:
        own = counted[number]
        others_V = total_V - np.bincount(own, minlength=size) + ADDED
        nats += float((math.log(others_V.sum()) - np.log(others_V[own])).sum())
    return nats / sum(len(counted[number]) for number in chosen)

"""The ids of pair shards as numpy views of the memory-mapped Arrow files: one gather per batch.

Indexing `datasets` would allocate an array for every caption of every row; here a caption is a slice.

Shapes: `B` samples, `N` image tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import numpy.typing as npt

from t2i_lm.tokenizers.layout import IntArray

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Batch:
    """One Arrow record batch of R rows.

    Row r has captions `row_starts[r]` to `row_starts[r + 1]`; caption c has ids `caption_starts[c]` to
    `caption_starts[c + 1]`.
    """

    image_ids_RN: IntArray
    row_starts: Offsets
    caption_starts: Offsets
    text_ids: IntArray


class PairColumns:
    """Image ids and captions of the rows of a split."""

    def __init__(self, split: datasets.Dataset) -> None:
        """Memory-maps the ids; reads only offsets."""
        self._split = split
        batches = split.with_format("arrow")[:].select(["image_ids", "text_ids"]).to_batches()
        self._begin = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._batches = []
        for batch in batches:
            images, captions = batch.column("image_ids"), batch.column("text_ids")
            ids = captions.values
            self._batches.append(
                _Batch(
                    image_ids_RN=images.flatten().to_numpy().reshape(batch.num_rows, -1),
                    row_starts=captions.offsets.to_numpy(),
                    caption_starts=ids.offsets.to_numpy(),
                    text_ids=ids.values.to_numpy(),
                )
            )

    def __reduce__(self) -> tuple[type["PairColumns"], tuple[datasets.Dataset]]:
        # Spawned workers map the files again: pickling the views would copy all ids.
        return PairColumns, (self._split,)

    def __len__(self) -> int:
        return len(self._split)

    def caption_counts(self) -> Offsets:
        """Number of captions of each row."""
        return np.concatenate([np.diff(batch.row_starts) for batch in self._batches])

    def count(self, row: int) -> int:
        """Number of captions of a row."""
        batch, place = self._find(row)
        return int(batch.row_starts[place + 1] - batch.row_starts[place])

    def caption(self, row: int, number: int) -> IntArray:
        """Text ids of caption `number` of a row."""
        batch, place = self._find(row)
        caption = batch.row_starts[place] + number
        return batch.text_ids[batch.caption_starts[caption] : batch.caption_starts[caption + 1]]

    def images(self, rows: list[int]) -> IntArray:
        """Image ids (B, N) of rows."""
        return np.stack([batch.image_ids_RN[place] for batch, place in map(self._find, rows)])

    def image_rows(self) -> Iterator[IntArray]:
        """Image ids (N,) of every row, in order."""
        for batch in self._batches:
            yield from batch.image_ids_RN

    def _find(self, row: int) -> tuple[_Batch, int]:
        number = int(np.searchsorted(self._begin, row, side="right")) - 1
        return self._batches[number], row - int(self._begin[number])

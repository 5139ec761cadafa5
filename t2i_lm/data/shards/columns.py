"""The ids of pair shards as numpy views of the mapped Arrow files: a batch costs one gather.

Indexing `datasets` builds every caption of every row as an array of its own; here a caption is a slice.

Shapes: `B` samples, `N` image tokens.
"""

from dataclasses import dataclass

import datasets
import numpy as np
import numpy.typing as npt

from t2i_lm.tokenizers.layout import IntArray

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Batch:
    """One record batch.

    Row r has the captions from `first[r]` to `first[r + 1]`, caption c the ids from `start[c]` to `start[c + 1]`.
    """

    image_ids_RN: IntArray
    first: Offsets
    start: Offsets
    text_ids: IntArray


class PairColumns:
    """Image ids and captions of the rows of a split."""

    def __init__(self, split: datasets.Dataset) -> None:
        """Maps; reads nothing but offsets."""
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
                    first=captions.offsets.to_numpy(),
                    start=ids.offsets.to_numpy(),
                    text_ids=ids.values.to_numpy(),
                )
            )

    def __reduce__(self) -> tuple[type["PairColumns"], tuple[datasets.Dataset]]:
        # A loader's worker that is not forked maps the files anew: pickled views would be copies of all ids.
        return PairColumns, (self._split,)

    def __len__(self) -> int:
        return len(self._split)

    def caption_counts(self) -> Offsets:
        """Captions of each row."""
        return np.concatenate([np.diff(batch.first) for batch in self._batches])

    def count(self, row: int) -> int:
        """Captions of a row."""
        batch, place = self._find(row)
        return int(batch.first[place + 1] - batch.first[place])

    def caption(self, row: int, number: int) -> IntArray:
        """Text ids of one caption of a row."""
        batch, place = self._find(row)
        caption = batch.first[place] + number
        return batch.text_ids[batch.start[caption] : batch.start[caption + 1]]

    def images(self, rows: list[int]) -> IntArray:
        """Image ids (B, N) of rows."""
        found = [self._find(row) for row in rows]
        return np.stack([batch.image_ids_RN[place] for batch, place in found])

    def _find(self, row: int) -> tuple[_Batch, int]:
        number = int(np.searchsorted(self._begin, row, side="right")) - 1
        return self._batches[number], row - int(self._begin[number])

"""The ids of pair shards as numpy views of the memory-mapped Arrow files: one gather per batch.

Indexing `datasets` would allocate an array for every caption of every row; here a caption is a slice.

Shapes: `B` samples, `N` image tokens.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from t2i_lm.data.shards.parts import Parts
from t2i_lm.tokenizers.layout import IntArray

Offsets = npt.NDArray[np.int64]
# Remote parts that a process has open at a time.
MOST_OPEN = 256


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


class _Part:
    """The rows of one part, and the verified state of the files that are mapped."""

    def __init__(self, table: pa.Table, state: int) -> None:
        self.state = state
        self._begin, self._batches = [0], list[_Batch]()
        for batch in table.select(["image_ids", "text_ids"]).to_batches():
            images, captions = batch.column("image_ids"), batch.column("text_ids")
            ids = captions.values
            self._begin.append(self._begin[-1] + batch.num_rows)
            self._batches.append(
                _Batch(
                    image_ids_RN=images.flatten().to_numpy().reshape(batch.num_rows, -1),
                    row_starts=captions.offsets.to_numpy(),
                    caption_starts=ids.offsets.to_numpy(),
                    text_ids=ids.values.to_numpy(),
                )
            )

    @cached_property
    def caption_ends(self) -> Offsets:
        """Number of captions up to the end of each row."""
        return np.cumsum(self.caption_counts())

    def caption_counts(self) -> Offsets:
        """Number of captions of each row."""
        return np.concatenate([np.diff(batch.row_starts) for batch in self._batches])

    def image_rows(self) -> Iterator[IntArray]:
        """Image ids (N,) of every row."""
        for batch in self._batches:
            yield from batch.image_ids_RN

    def find(self, row: int) -> tuple[_Batch, int]:
        """The record batch of a row, and the row's place in it."""
        number = bisect_right(self._begin, row) - 1
        return self._batches[number], row - self._begin[number]


class PairColumns:
    """Image ids and captions of the rows of a split; its parts are opened when they are first read.

    Attributes:
        parts: the split.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._starts: list[int] = [0, *np.cumsum(parts.rows).tolist()]
        self._open: OrderedDict[int, _Part] = OrderedDict()

    def __reduce__(self) -> tuple[type["PairColumns"], tuple[Parts]]:
        # Spawned workers map the files again: pickling the views would copy all ids.
        return PairColumns, (self.parts,)

    def __len__(self) -> int:
        return self._starts[-1]

    def open(self, numbers: set[int]) -> None:
        """Fetches and verifies parts that are not open, several at a time; opens those anew whose files have changed.

        A file that is cut while it is mapped would end the process by SIGBUS when it is read.
        """
        for number in numbers & self._open.keys():
            if self._has_changed(number):
                del self._open[number]
        if missing := numbers - self._open.keys():
            self.parts.fetch(missing)

    def _has_changed(self, number: int) -> bool:
        return self.parts.state(number) not in (self._open[number].state, None)

    def captions_by_part(self) -> Offsets:
        """Number of captions of each part: those that the index counts, else counted in all parts."""
        if self.parts.captions is not None:
            return self.parts.captions
        counts = np.zeros(len(self.parts.rows), dtype=np.int64)
        for number in np.flatnonzero(self.parts.rows).tolist():
            counts[number] = self._part(number).caption_counts().sum()
        return counts

    def nth_caption(self, part: int, place: int) -> tuple[int, int]:
        """Row, and number among its captions, of the caption at a place among all captions of a part."""
        ends = self._part(part).caption_ends
        row = int(np.searchsorted(ends, place, side="right"))
        return self._starts[part] + row, place - int(ends[row - 1] if row else 0)

    def caption_counts(self) -> Offsets:
        """Number of captions of each row; reads all parts."""
        return np.concatenate([part.caption_counts() for part in self._all()])

    def count(self, row: int) -> int:
        """Number of captions of a row."""
        batch, place = self._find(row)
        return int(batch.row_starts[place + 1] - batch.row_starts[place])

    def caption(self, row: int, number: int) -> IntArray:
        """Text ids of caption `number` of a row, copied from the file."""
        batch, place = self._find(row)
        caption = batch.row_starts[place] + number
        return batch.text_ids[batch.caption_starts[caption] : batch.caption_starts[caption + 1]].copy()

    def images(self, rows: list[int]) -> IntArray:
        """Image ids (B, N) of rows, read after their captions.

        Raises:
            PartError: if a file has changed since it was verified.
        """
        ids_BN = np.stack([batch.image_ids_RN[place] for batch, place in map(self._find, rows)])
        for number in {bisect_right(self._starts, row) - 1 for row in rows}:
            if self._has_changed(number):  # while they were read
                self.parts.files(number)
        return ids_BN

    def image_rows(self) -> Iterator[IntArray]:
        """Image ids (N,) of every row, in order."""
        for part in self._all():
            yield from part.image_rows()

    def _all(self) -> Iterator[_Part]:
        return map(self._part, np.flatnonzero(self.parts.rows).tolist())

    def _find(self, row: int) -> tuple[_Batch, int]:
        number = bisect_right(self._starts, row) - 1
        return self._part(number).find(row - self._starts[number])

    def _part(self, number: int) -> _Part:
        part = self._open.get(number)
        if part is None:
            part = self._open[number] = _Part(self.parts.table(number), self.parts.verified_state(number))
            while self.parts.is_remote and len(self._open) > MOST_OPEN:  # a mapped file takes disk after its deletion
                self._open.popitem(last=False)
        elif self.parts.is_remote:
            self._open.move_to_end(number)
        return part

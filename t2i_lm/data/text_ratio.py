"""`data.text_ratio`: text ids per image id of a training sequence, by joined or left-out captions.

A remedy's confound, stated here because both change more than the ratio: above the ratio of single captions a sequence
repeats what it says in other words or the same ones, so that its text is easier than that of validation; below it some
images have no caption, as with `data.caption_dropout`, and are learned without a condition.
"""

from collections.abc import Callable, Mapping
from math import ceil

import numpy as np

from t2i_lm.tokenizers.layout import IntArray

# Share of captions that must fit behind a joined text of the wanted length.
WHOLE = 0.99


class TextRatio:
    """Composes the text of a sample from the captions of its image.

    Above the mean length of a caption: the sample's own caption, the image's others in random order, then all again,
    until the wanted length; the last is in by a chance that makes the expected length exact. Below it: a sample keeps
    its caption by chance. Both are a function of (seed, epoch, sample), never of the rank or the batch.

    Attributes:
        keep: share of samples that keep their captions.
        length: text ids to which captions are joined; 0 if none are.
    """

    def __init__(self, ratio: float, image_tokens: int, budget: int, lengths: Mapping[int, int], seed: int) -> None:
        """`budget` is the layout's of text ids, `lengths` the number of training captions by length in ids.

        Raises:
            ValueError: if the training captions are empty, or `data.length` has too little room.
        """
        self.seed = seed
        wanted = ratio * image_tokens
        sizes = np.minimum(np.array(sorted(lengths)), budget)
        shares = np.array([lengths[length] for length in sorted(lengths)]) / max(1, sum(lengths.values()))
        mean = float(sizes @ shares)
        if not mean:
            raise ValueError(f"data.text_ratio={ratio}: expected null, the training captions are empty")
        self.keep, self.length = min(1.0, wanted / mean), 0.0
        if wanted <= mean:
            return
        # A caption longer than the wanted length is kept whole, so that the others are joined to a little less.
        low, high = 0.0, wanted
        for _ in range(50):
            self.length = (low + high) / 2
            low, high = (low, self.length) if np.maximum(sizes, self.length) @ shares > wanted else (self.length, high)
        last = int(sizes[np.searchsorted(np.cumsum(shares), WHOLE)])
        if (room := ceil(self.length) + last) > budget:
            raise ValueError(
                f"data.text_ratio={ratio}: {ceil(wanted)} text ids for {image_tokens} image ids, and the caption that "
                f"exceeds them, need {room - budget} more positions; raise data.length"
            )

    def compose(self, caption: Callable[[int], IntArray], count: int, first: int, epoch: int, index: int) -> IntArray:
        """Text ids of a sample.

        Args:
            caption: ids of the image's caption by number.
            count: captions of the image.
            first: number of the sample's own caption.
            epoch: of the draw.
            index: of the draw.
        """
        text = caption(first)
        rng = np.random.default_rng([self.seed, epoch, index, 3])
        if self.keep < 1:
            return text if rng.random() < self.keep else text[:0]
        others = [number for number in range(count) if number != first]
        order = [first, *rng.permutation(others).tolist()]
        parts, total, place = [text], len(text), 1
        while total < self.length and any(len(caption(number)) for number in order):
            more = caption(order[place % count])
            place += 1
            left = self.length - total
            if len(more) > left and rng.random() * len(more) >= left:
                break
            parts.append(more)
            total += len(more)
        return np.concatenate(parts) if len(parts) > 1 else text

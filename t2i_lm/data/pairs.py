"""Caption-image pairs: interfaces of their sources, and image decoding."""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, UnidentifiedImageError

from t2i_lm.data.color_modes import UnknownRangeError
from t2i_lm.data.image_files import MAX_PIXELS as MAX_PIXELS
from t2i_lm.data.image_files import TooLargeError, open_image, read_rgb
from t2i_lm.storage.reading import SpecialFileError, require_lasting


@dataclass(frozen=True)
class Pair:
    """An image with its captions.

    Attributes:
        id: unique within its source.
        image: RGB image of any size.
        captions: at least one.
        meaning: content of a generated scene (JSON values); None for photographs.
    """

    id: str
    image: Image.Image
    captions: list[str]
    meaning: dict[str, Any] | None


# Reads one pair, or raises `RejectedPairError`.
Sample = Callable[[], Pair]


class CaptionedSource(Protocol):
    """A sized sequence of pairs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...


@runtime_checkable
class StreamedSource(Protocol):
    """Pairs that can only be read sequentially, in independent shards."""

    @property
    def shards(self) -> int: ...

    def shard(self, number: int) -> Iterator[Sample]: ...


class RejectedPairError(Exception):
    """An unusable sample; `reason` is a short class of failure, the message also names the sample."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{detail}: {reason}")
        self.reason = reason


def decode_image(file: Any, name: str) -> Image.Image:
    """An RGB image, upright, from a path or binary stream; of an animation, its first frame.

    Raises:
        RejectedPairError: if the file is missing, not an image of a format in `image_files.py`, truncated, too large
            to be decoded in 300 MB, or of a mode whose values have no known range (`color_modes.py`).
        ValueError: if the system cannot read it now, as with too many open files.
        MemoryError: if the memory is exhausted.
    """
    held = file.getbuffer().nbytes if isinstance(file, io.BytesIO) else 0
    with _rejecting(name), open_image(file) as image:
        return read_rgb(image, held)


def rgb_of(image: Image.Image, name: str) -> Image.Image:
    """An image of Pillow in RGB, upright, as `decode_image` reads its file; a large JPEG is not reduced.

    Raises:
        RejectedPairError: as `decode_image`.
    """
    if image.width * image.height > MAX_PIXELS:
        raise RejectedPairError(f"more than {MAX_PIXELS:,} pixels", name)
    with _rejecting(name):
        copied = image.copy()  # which is turned in place
        copied.format = image.format
        return read_rgb(copied)


@contextmanager
def _rejecting(name: str) -> Iterator[None]:
    """Makes a RejectedPairError of what opening and decoding an image raise, faults of the system aside."""
    try:
        yield
    except FileNotFoundError as error:
        raise RejectedPairError("missing file", name) from error
    except UnidentifiedImageError as error:
        raise RejectedPairError("not an image", name) from error
    except TooLargeError as error:
        raise RejectedPairError(str(error), f"{name} ({error.found})") from error
    except (UnknownRangeError, SpecialFileError) as error:
        raise RejectedPairError(str(error), name) from error
    except Exception as error:  # Pillow's readers raise many types on damaged files
        require_lasting(error, name)
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, not of a reader
            raise RejectedPairError(f"unreadable file ({error.strerror})", name) from error
        raise RejectedPairError("truncated or corrupt", name) from error


def center_crop(image: Image.Image, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The center square, resized (bicubic) to `size` x `size`; (H, W, 3) uint8 (Section 2.1)."""
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=1)
    return np.asarray(image, dtype=np.uint8)


def cropped_images(samples: Iterable[Sample], size: int) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.uint8]]]]:
    """Ids and center squares of the usable samples, in order; `size` in pixels."""
    for read in samples:
        try:
            pair = read()
            yield pair.id, center_crop(pair.image, size)
        except RejectedPairError:
            continue

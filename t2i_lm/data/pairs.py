"""Caption-image pairs: interfaces of their sources, and image decoding."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from t2i_lm.data.color_modes import UnknownRangeError, to_rgb


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


# Larger images, in pixels, are rejected before decoding.
MAX_PIXELS = 64_000_000


class RejectedPairError(Exception):
    """An unusable sample; `reason` is a short class of failure, the message also names the sample."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{detail}: {reason}")
        self.reason = reason


def decode_image(file: Any, name: str) -> Image.Image:
    """An RGB image, upright, from a path or binary stream; of an animation, its first frame.

    Raises:
        RejectedPairError: if the file is missing, not an image, truncated, larger than `MAX_PIXELS`, or of a mode whose
            values have no known range (`color_modes.py`).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
        if image.width * image.height > MAX_PIXELS:
            raise RejectedPairError(f"over {MAX_PIXELS} pixels", name)
        return to_rgb(ImageOps.exif_transpose(image), image.format)
    except FileNotFoundError as error:
        raise RejectedPairError("missing file", name) from error
    except UnidentifiedImageError as error:
        raise RejectedPairError("not an image", name) from error
    except UnknownRangeError as error:
        raise RejectedPairError(str(error), name) from error
    except RejectedPairError:
        raise
    except Exception as error:  # Pillow's readers raise many types on damaged files
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

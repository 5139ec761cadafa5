"""Image files of an explicit list of formats, whose memory is bounded by their header, before a pixel is decoded."""

import os
import warnings
from importlib.util import find_spec
from typing import Any

from PIL import Image, ImageOps

from t2i_lm.data.color_modes import to_rgb
from t2i_lm.storage.reading import require_regular

# Pillow's other readers stay closed: that of EPS starts Ghostscript.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"]
FORMATS += ["AVIF"] if find_spec("PIL.AvifImagePlugin") else []  # since Pillow 11.3
# Images of more pixels, or that take more memory while they are decoded, are rejected.
MAX_PIXELS, MAX_BYTES = 64_000_000, 300_000_000
TOO_MANY, TOO_MUCH = f"over {MAX_PIXELS:,} pixels", f"over {MAX_BYTES // 10**6} MB when decoded"
# Larger files are no images: they are rejected before they are read.
MAX_FILE_BYTES = MAX_BYTES
# What the process needs beside the pixels: tiles of a conversion, tables of a decoder.
RESERVE = 30_000_000
# Bytes per pixel of Pillow's modes; four of all others.
MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
# Bytes per pixel that a decoder takes beside the image itself, measured; of others, none.
DECODER_BYTES = {"WEBP": 12, "AVIF": 16, "JPEG2000": 22, "TIFF": 8}
# Readers of portable bitmaps in Python, at a million pixels per second, which memory would not bound.
SLOW_DECODERS, SLOW_BYTES = ("ppm", "ppm_plain"), 60
ORIENTATION = 0x0112  # tag of EXIF


class TooLargeError(OSError):
    """An image over `MAX_PIXELS` or `MAX_BYTES`: the message is the reason, `found` is its size and kind."""

    def __init__(self, reason: str, image: Image.Image | None = None) -> None:
        super().__init__(reason)
        self.found = f"{image.width} x {image.height} {image.mode} {image.format}" if image else "by its header"


def open_image(file: Any) -> Image.Image:
    """An image of `FORMATS` from a path or binary stream, its header read and its pixels not yet.

    Raises:
        OSError: if it cannot be read, is of another format, or is a FIFO, device or socket.
        TooLargeError: if its header states more pixels than Pillow opens.
    """
    if isinstance(file, str | os.PathLike):
        require_regular(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on size, which `read_rgb` checks, and on damaged metadata
        try:
            return Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise TooLargeError(TOO_MANY) from error


def read_rgb(image: Image.Image, held: int = 0) -> Image.Image:
    """The pixels of an opened image in RGB, upright; of an animation, its first frame.

    A JPEG that would take too much memory is decoded at a half, a quarter or an eighth of its size.

    Args:
        image: of `open_image`.
        held: bytes of memory that the file itself takes.

    Raises:
        TooLargeError: before decoding, if it would take more memory than `MAX_BYTES`.
        UnknownRangeError: if the range of its values is unknown.
    """
    if image.width * image.height > MAX_PIXELS:
        raise TooLargeError(TOO_MANY, image)
    is_jpeg = image.format in ("JPEG", "MPO")
    turned = is_jpeg and _turned(image)  # other formats may have their metadata behind the pixels
    divisors = (1, 2, 4, 8) if is_jpeg else (1,)
    fits = [divisor for divisor in divisors if _memory(image, turned, divisor) + held <= MAX_BYTES]
    if not fits:
        raise TooLargeError(TOO_MUCH, image)
    if fits[0] > 1:
        image.draft(None, (image.width // fits[0], image.height // fits[0]))
    image.load()
    turned = _turned(image)
    if turned and _memory(image, True) + held > MAX_BYTES:
        raise TooLargeError(TOO_MUCH, image)
    rgb = to_rgb(image, image.format)
    if turned:
        rgb.getexif()[ORIENTATION] = image.getexif()[ORIENTATION]
        ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _turned(image: Image.Image) -> bool:
    return image.getexif().get(ORIENTATION, 1) in range(2, 9)


def _memory(image: Image.Image, turned: bool, divisor: int = 1) -> int:
    """Bytes that decoding at a fraction of the size and conversion to RGB take at their peak."""
    whole = image.width * image.height
    pixels = -(-image.width // divisor) * -(-image.height // divisor)
    stored = MODE_BYTES.get(image.mode, 4) * pixels
    extra = DECODER_BYTES.get(str(image.format), 0) * whole
    if "progressive" in image.info:  # coefficients of the whole image
        extra += 2 * len(image.getbands()) * whole
    if any(tile[0] in SLOW_DECODERS for tile in getattr(image, "tile", ())):
        extra += SLOW_BYTES * whole
    converts = image.mode != "RGB" or image.has_transparency_data
    kept = stored + 4 * pixels if converts else stored
    return max(stored + extra, kept + (4 * pixels if turned else 0)) + RESERVE

"""Conversion of every Pillow color mode to opaque RGB, by rule.

- Transparent pixels are composited over white.
- 16-bit gray (`I;16`, or `I` of a PNG or PNM file) is scaled from 0..65535; other 32-bit integers have no known range.
- Float gray (`F`) is scaled from [0, 1]; other values have no known range.
- LAB is converted by color management. An embedded color profile is not applied.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

# Pillow scales the gray values of these formats to 16 bits where it uses the 32-bit mode.
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
WHITE = 255
# Pixels that are converted at once.
TILE = 2**20


class UnknownRangeError(ValueError):
    """An image whose values have no known range; the message is the reason."""


def to_rgb(image: Image.Image, file_format: str | None = None) -> Image.Image:
    """The image in RGB, opaque; the values of an opaque RGB or 8-bit gray image are unchanged.

    It is converted in tiles, so that a large image takes the memory of its source and its result alone.

    Args:
        image: of any mode; returned itself if it is opaque RGB.
        file_format: Pillow's name of the file's format, which decides the range of mode `I`.

    Raises:
        UnknownRangeError: if the range of its values is unknown.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "I" and file_format not in SIXTEEN_BIT_FORMATS:
        raise UnknownRangeError("32-bit integer image")
    rgb = Image.new("RGB", image.size)
    for box in _tiles(*image.size):
        rgb.paste(_converted(image.crop(box)), box)
    return rgb


def _tiles(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of at most `TILE` pixels that cover an image."""
    across = min(width, TILE)
    down = TILE // max(1, across)
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(width, left + across), min(height, top + down)


def _converted(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _gray(image)
    if image.has_transparency_data:
        return _over_white(image)
    if image.mode == "LAB":
        return _from_lab(image)
    return image.convert("RGB")


def _gray(image: Image.Image) -> Image.Image:
    values_HW = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values_HW).all() and values_HW.min() >= 0 and values_HW.max() <= 1):
            raise UnknownRangeError("float image with values outside [0, 1]")
        bytes_HW = (values_HW.astype(np.float64) * 255).round()
    else:
        bytes_HW = (values_HW / 257).round().clip(0, 255)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        bytes_HW[values_HW == clear] = WHITE
    return Image.fromarray(bytes_HW.astype(np.uint8)).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)  # from colors multiplied by alpha
    rgba = (image.convert(straight) if straight else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (WHITE,) * 4), rgba).convert("RGB")


@functools.cache
def _lab_to_srgb() -> Any:
    from PIL import ImageCms

    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    converted = ImageCms.applyTransform(image, _lab_to_srgb())
    assert converted is not None  # None where the transform is in place
    return converted

"""Grids of images above their captions."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PIXELS = 192  # side of an image in the grid
TEXT_LINES, LINE_HEIGHT, CHARACTERS, MARGIN = 4, 14, 31, 8


def captioned_grid(
    images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]], captions: Sequence[str], columns: int = 4
) -> Image.Image:
    """Images (H, W, 3) uint8 in rows of `columns`, each above its caption.

    Raises:
        ValueError: if there are no images, or their number is not that of the captions.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"{len(images)} images for {len(captions)} captions: expected equal numbers above 0")
    cell_width, cell_height = PIXELS + 2 * MARGIN, PIXELS + TEXT_LINES * LINE_HEIGHT + 2 * MARGIN
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=11)
    for number, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = number % columns * cell_width + MARGIN, number // columns * cell_height + MARGIN
        image = Image.fromarray(pixels).resize((PIXELS, PIXELS), Image.Resampling.NEAREST)
        grid.paste(image, (left, top))
        lines = textwrap.wrap(caption, CHARACTERS)[:TEXT_LINES]
        for line, text in enumerate(lines):
            draw.text((left, top + PIXELS + 4 + line * LINE_HEIGHT), text, fill="black", font=font)
    return grid

"""Grids of images above their captions."""

import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from t2i_lm.data.image_files import open_image, read_rgb
from t2i_lm.storage.writing import atomic_file

PIXELS = 192  # side of an image in the grid
TEXT_LINES, LINE_HEIGHT, CHARACTERS, MARGIN = 4, 14, 31, 8
CAPTIONS = "captions"  # key of a PNG's text
DESCRIPTION = 0x010E  # EXIF tag of a WebP's


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


def save_grid(images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]], captions: Sequence[str], file: Path) -> None:
    """Writes `captioned_grid` as PNG, with the captions as text in its metadata.

    Raises:
        OSError: if the file cannot be written.
    """
    text = PngInfo()
    text.add_itxt(CAPTIONS, json.dumps(list(captions)))
    grid = captioned_grid(images, captions)
    with atomic_file(file) as own:
        grid.save(own, pnginfo=text)


@dataclass(frozen=True)
class GridCell:
    """An image of a grid with its caption: as text, None in files of earlier versions, and as pixels."""

    image: Image.Image
    caption: str | None
    caption_image: Image.Image


def grid_cells(file: Path) -> list[GridCell]:
    """The cells of a PNG of `captioned_grid` or a WebP of `first_rows`, row by row; empty for another image.

    Empty cells are left out.

    Raises:
        OSError: if the file cannot be read.
    """
    with open_image(file) as opened:
        grid = read_rgb(opened)
        captions = _captions(opened.info.get(CAPTIONS) or opened.getexif().get(DESCRIPTION))
    width, height = PIXELS + 2 * MARGIN, PIXELS + TEXT_LINES * LINE_HEIGHT + 2 * MARGIN
    if grid.width % width or grid.height % height:
        return []
    places = product(range(0, grid.height, height), range(0, grid.width, width))
    cells = []
    for number, (top, left) in enumerate(places):
        cell = grid.crop((left, top, left + width, top + height))
        if captions is not None and number >= len(captions):
            break
        if captions is None and cell.getcolors(1) == [(width * height, (255, 255, 255))]:
            continue
        image = cell.crop((MARGIN, MARGIN, MARGIN + PIXELS, MARGIN + PIXELS))
        below = cell.crop((MARGIN, MARGIN + PIXELS, width, height))
        cells.append(GridCell(image, None if captions is None else captions[number], below))
    return cells


def first_rows(file: Path, rows: int, quality: int) -> bytes | None:
    """The first rows of a PNG of `captioned_grid` as WebP with its captions; None for another image.

    Raises:
        OSError: if the file cannot be read.
    """
    cells = grid_cells(file)
    if not cells:
        return None
    with open_image(file) as opened:
        grid = read_rgb(opened)
    height = PIXELS + TEXT_LINES * LINE_HEIGHT + 2 * MARGIN
    columns = grid.width // (PIXELS + 2 * MARGIN)
    captions = [cell.caption for cell in cells[: rows * columns]]
    exif = Image.Exif()
    if None not in captions:
        exif[DESCRIPTION] = json.dumps(captions)
    content = io.BytesIO()
    grid.crop((0, 0, grid.width, min(grid.height, rows * height))).save(
        content, format="webp", quality=quality, method=6, exif=exif
    )
    return content.getvalue()


def _captions(text: str | None) -> list[str] | None:
    """Captions of a file's metadata; None if it has none of ours."""
    try:
        found = json.loads(text or "null")
    except json.JSONDecodeError:
        return None
    return [str(caption) for caption in found] if isinstance(found, list) else None

"""Images as data URIs, small enough for one page."""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image, ImageChops

from t2i_lm.data.image_files import open_image, read_rgb
from t2i_lm.generation.grid import GridCell, grid_cells
from t2i_lm.plots.panels import STYLE

# Bytes above which a figure is drawn as pixels, and an image compressed with loss.
LARGEST_SVG, LARGEST_PNG = 400_000, 30_000
FIGURE_DPI, QUALITY = 140, 85
WIDEST = 1200  # pixels of an image that is not cut into cells


@dataclass(frozen=True)
class PageImage:
    """An image of the page.

    Attributes:
        source: data URI.
        width, height: in CSS pixels.
        lines: whether it is a drawing, whose lightness a dark page may invert; photographs stay as they are.
    """

    source: str
    width: int
    height: int
    lines: bool = False


@dataclass(frozen=True)
class CaptionedImage:
    """A cell of a grid: the image with its caption, as text or, from older runs, as the pixels of the grid."""

    image: PageImage
    caption: str | None
    caption_image: PageImage | None


def figure_image(figure: Figure) -> PageImage:
    """A figure as SVG, or as PNG where that is smaller than a large SVG; text is drawn as outlines."""
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    lines = not figure.findobj(AxesImage)
    background = "none" if lines else "white"
    for axes in figure.axes if lines else ():
        axes.set_facecolor("none")
    with rc_context({**STYLE, "svg.hashsalt": "t2i_lm", "svg.fonttype": "path"}):
        file = io.BytesIO()
        figure.savefig(file, format="svg", facecolor=background, metadata={"Date": None, "Creator": None})
        if file.tell() <= LARGEST_SVG:
            return PageImage(_uri(_opened(file.getvalue()), "svg+xml"), width, height, lines)
        file = io.BytesIO()
        figure.savefig(file, format="png", facecolor=background, dpi=FIGURE_DPI)
    return PageImage(_uri(file.getvalue(), "png"), width, height, lines)


def _opened(svg: bytes) -> bytes:
    """An SVG without its document type and metadata, which name addresses outside."""
    svg = re.sub(rb"<!DOCTYPE.*?>", b"", svg, count=1, flags=re.DOTALL)
    return re.sub(rb"<metadata>.*?</metadata>", b"", svg, count=1, flags=re.DOTALL)


def whole_image(file: Path) -> PageImage:
    """An image file, at most `WIDEST` pixels wide.

    Raises:
        OSError: if it cannot be read.
    """
    with open_image(file) as image:
        return _page_image(read_rgb(image), WIDEST)


def captioned_images(file: Path, count: int) -> list[CaptionedImage]:
    """The first cells of a grid of samples; empty if the file is no such grid.

    Raises:
        OSError: if it cannot be read.
    """
    return [_captioned(cell) for cell in grid_cells(file)[:count]]


def _captioned(cell: GridCell) -> CaptionedImage:
    pixels = None if cell.caption is not None else _page_image(_trimmed(cell.caption_image), WIDEST, lines=True)
    return CaptionedImage(_page_image(cell.image, WIDEST), cell.caption, pixels)


def _trimmed(image: Image.Image) -> Image.Image:
    """An image without the white around its content."""
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    return image if box is None else image.crop((0, 0, box[2] + 1, box[3] + 1))


def _page_image(image: Image.Image, widest: int, lines: bool = False) -> PageImage:
    if image.width > widest:
        image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    kind = "png"
    if file.tell() > LARGEST_PNG:
        compressed = io.BytesIO()
        image.save(compressed, format="jpeg", quality=QUALITY)
        if compressed.tell() < file.tell():
            file, kind = compressed, "jpeg"
    return PageImage(_uri(file.getvalue(), kind), image.width, image.height, lines)


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

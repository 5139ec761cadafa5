"""Figure 1: images as ids of an image tokenizer, and the matrices of a decoder expanded by their vocabulary."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from t2i_lm.comparison.comparability import OF_RESULTS, MissingRunsError
from t2i_lm.plots.panels import GREY, captioned_figure
from t2i_lm.runtime.tables import text_table
from t2i_lm.storage.reading import reading
from t2i_lm.storage.run_folder import TOKENS, Run, is_collected, read_run, run_folders
from t2i_lm.tokenizers.joint_vocab import SPECIALS, JointVocab

Pixels = npt.NDArray[Any]
TEXT_COLOR, SPECIAL_COLOR, IMAGE_COLOR, BODY_COLOR = "#0072B2", GREY, "#D55E00", "#e4e4e4"
# Grids with more ids than this to a side show colors alone.
WRITTEN_IDS = 8


@dataclass(frozen=True)
class TokenizedImage:
    """An image (H, W, 3), its ids (h, w), its reconstruction (H, W, 3) and its caption."""

    original_HW3: Pixels
    ids_hw: Pixels
    reconstruction_HW3: Pixels
    caption: str

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio of the reconstruction, dB."""
        difference = self.original_HW3.astype(np.float64) - self.reconstruction_HW3
        error = float(np.square(difference / 255).mean())
        return -10 * math.log10(error) if error else math.inf


def _decibels(psnr: float, digits: int) -> str:
    return "exact" if math.isinf(psnr) else f"{psnr:.{digits}f} dB"


def newest_run(root: Path) -> Run | None:
    """The newest finished text-to-image run of either arm, if there is one."""
    folders = [folder for name in ("t2i_pretrained", "t2i_scratch") for folder in run_folders(root, name)]
    finished = [folder for folder in folders if (folder / TOKENS).is_file()]
    return read_run(max(finished, key=lambda folder: folder.name)) if finished else None


def tokenized_images(run: Run) -> tuple[list[TokenizedImage], JointVocab, int]:
    """The images that a run's report wrote, its joint vocabulary and the decoder's width.

    Raises:
        ValueError: if they are not there.
    """
    file = run.folder / TOKENS
    if not file.is_file():
        if is_collected(run.folder):
            raise MissingRunsError(
                f"Figure 1: {run.folder}, {TOKENS}: {OF_RESULTS}; collect the run again with --images"
            )
        again = shlex.join(["python", "-m", "t2i_lm.evaluate", "--checkpoint", str(run.folder), "--report"])
        raise MissingRunsError(f"Figure 1: {run.folder} has no {TOKENS}; to make it: {again}")
    with reading("run folder", file), np.load(file) as stored:
        originals, ids, decoded, captions = (
            stored[name] for name in ("originals", "ids", "reconstructions", "captions")
        )
        text_rows, image_rows, width = (int(number) for number in stored["rows"])
    rows = zip(originals, ids, decoded, captions, strict=True)
    images = [TokenizedImage(original, grid, again, str(caption)) for original, grid, again, caption in rows]
    return images, JointVocab(text_rows, image_rows), width


def draw_figure1(images: Sequence[TokenizedImage], vocab: JointVocab, width: int, caption: str) -> Figure:
    """Left: each image, its ids and its reconstruction. Right: the expanded embedding and output matrices."""
    with captioned_figure(caption) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1), squeeze=False)[0]
        for row, (axes, image) in enumerate(zip(left.subplots(len(images), 3, squeeze=False), images, strict=True)):
            h, w = image.ids_hw.shape
            axes[0].imshow(image.original_HW3)
            axes[1].imshow(colormaps["turbo"](image.ids_hw / max(1, vocab.image_size - 1)), alpha=0.55)
            if max(h, w) <= WRITTEN_IDS:
                for (y, x), code in np.ndenumerate(image.ids_hw):
                    axes[1].text(x, y, str(code), ha="center", va="center", fontsize=5.5)
            axes[2].imshow(image.reconstruction_HW3)
            titles = ("image", f"{h} x {w} ids", f"reconstruction, {_decibels(image.psnr, 1)}")
            for one, title in zip(axes, titles, strict=True):
                one.set_xticks([])
                one.set_yticks([])
                one.grid(False)
                if row == 0 or title.startswith("recon"):
                    one.set_title(title, fontsize=8.5, fontweight="normal")
        _draw_matrices(right.subplots(), vocab, width)
    return figure


def _draw_matrices(axes: Axes, vocab: JointVocab, width: int) -> None:
    """Both matrices as blocks of rows around the decoder; heights are of the blocks, not to scale."""
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    axes.axis("off")
    blocks = (
        ("text rows", vocab.text_size, TEXT_COLOR, 4.2),
        ("special rows", len(SPECIALS), SPECIAL_COLOR, 0.9),
        ("image rows", vocab.image_size, IMAGE_COLOR, 3.4),
    )
    for left, title in ((0.2, "embedding"), (7.0, "output")):
        axes.text(left + 1.4, 9.6, title, ha="center", fontsize=9, fontweight="bold")
        top = 9.2
        for name, rows, color, height in blocks:
            axes.add_patch(Rectangle((left, top - height), 2.8, height - 0.08, facecolor=color, alpha=0.85))
            words = f"{rows:,}\n{name}" if height > 1 else f"{rows:,} {name}"
            axes.text(left + 1.4, top - height / 2, words, ha="center", va="center", fontsize=7.5, color="white")
            top -= height
        axes.text(left + 1.4, top - 0.35, f"{vocab.size:,} x {width:,}", ha="center", va="center", fontsize=8)
    axes.add_patch(Rectangle((3.9, 2.6), 2.2, 4.6, facecolor=BODY_COLOR, edgecolor=GREY))
    axes.text(5, 4.9, "decoder\nblocks", ha="center", va="center", fontsize=8.5)
    for start, end in ((3.05, 3.85), (6.15, 6.95)):
        axes.add_patch(FancyArrowPatch((start, 4.9), (end, 4.9), arrowstyle="-|>", mutation_scale=9, color=GREY))


def figure1_table(images: Sequence[TokenizedImage], vocab: JointVocab, width: int) -> str:
    """Rows of the joint vocabulary, and the reconstruction of each image."""
    sizes = vocab.text_size, len(SPECIALS), vocab.image_size
    rows = [(name, f"{size:,}") for name, size in zip(("text", "special", "image"), sizes, strict=True)]
    rows.append(("all", f"{vocab.size:,} x {width:,}"))
    psnr = [
        (image.caption[:60], _decibels(image.psnr, 2).removesuffix(" dB"), len(np.unique(image.ids_hw)))
        for image in images
    ]
    tables = [text_table(("rows of both matrices", ""), rows)]
    return "\n\n".join([*tables, text_table(("image", "PSNR (dB)", "distinct ids"), psnr)])


def image_tokenizer_sentence(run: Run) -> str:
    """The image tokenizer of a run by path and hash."""
    sha256 = (run.environment.get("tokenizers") or {}).get("image")
    words = f"Image tokenizer: {run.config['image_tokenizer']['path']}"
    return f"{words}, sha256 {sha256[:12]}." if sha256 else f"{words}."

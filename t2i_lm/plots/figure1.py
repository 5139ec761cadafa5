"""Figure 1: images as ids of an image tokenizer, and the matrices of a decoder expanded by their vocabulary."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.pairs import Pair, RejectedPairError, center_crop
from t2i_lm.data.shards.prepare import cut
from t2i_lm.data.sources import open_source
from t2i_lm.data.splits import validations_of
from t2i_lm.experiment.build import open_image
from t2i_lm.experiment.restore import image_config
from t2i_lm.models.factory import decoder_architecture, huggingface_folder
from t2i_lm.plots.panels import GREY, captioned_figure
from t2i_lm.runtime.tables import text_table
from t2i_lm.storage.run_folder import Run, read_run, run_folders
from t2i_lm.tokenizers.joint_vocab import SPECIALS, JointVocab

IMAGES = 2
TEXT_COLOR, SPECIAL_COLOR, IMAGE_COLOR, BODY_COLOR = "#0072B2", GREY, "#D55E00", "#e4e4e4"
# Grids with more ids than this to a side show colors alone.
WRITTEN_IDS = 8


@dataclass(frozen=True)
class TokenizedImage:
    """An image (H, W, 3), its ids (h, w), its reconstruction (H, W, 3) and its caption."""

    original_HW3: np.ndarray
    ids_hw: np.ndarray
    reconstruction_HW3: np.ndarray
    caption: str

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio of the reconstruction, dB."""
        difference = self.original_HW3.astype(np.float64) - self.reconstruction_HW3
        return float(-10 * np.log10(np.square(difference / 255).mean()))


def newest_run(root: Path) -> Run:
    """The newest text-to-image run of either arm.

    Raises:
        ValueError: if there is none.
    """
    folders = [folder for name in ("t2i_pretrained", "t2i_scratch") for folder in run_folders(root, name)]
    if not folders:
        raise ValueError(
            f"Figure 1: no run of t2i_pretrained or t2i_scratch in {root}; to make one: make exp-pretrained"
        )
    return read_run(max(folders, key=lambda folder: folder.name))


def tokenized_images(run: Run, count: int = IMAGES) -> tuple[list[TokenizedImage], JointVocab, int]:
    """The first validation images of a run through its image tokenizer, its joint vocabulary and the decoder's width.

    Raises:
        ValueError: if the run's data or tokenizers cannot be read, or its image tokenizer has no decoder.
    """
    config = image_config(run.folder)
    image = open_image(config)
    if not image.decodes:
        raise ValueError(f"image_tokenizer.path={config.image_tokenizer.path}: it has no decoder for reconstructions")
    images = []
    for pair in islice(_pairs(config, image.image_size), count):
        original_HW3 = np.asarray(center_crop(pair.image, image.image_size))
        ids_1N = image.encode(torch.from_numpy(original_HW3.copy()).permute(2, 0, 1)[None])
        decoded_HW3 = image.decode(ids_1N)[0].permute(1, 2, 0).cpu().numpy()
        ids_hw = ids_1N[0].view(image.grid).cpu().numpy()
        images.append(TokenizedImage(original_HW3, ids_hw, decoded_HW3, pair.captions[0]))
    if not images:
        raise ValueError(f"data.path={config.data.path}: no readable validation image")
    rows, width = _backbone_rows(config)
    return images, JointVocab(rows, image.vocab_size), width


def _pairs(config: ExperimentConfig, size: int) -> Iterator[Pair]:
    parts, _ = cut(open_source(config.data, validations_of(config.data)[0], size), None, config.data.part_size)
    for part in parts:
        for read in part():
            try:
                yield read()
            except RejectedPairError:
                continue


def _backbone_rows(config: ExperimentConfig) -> tuple[int, int]:
    """Rows and width of the backbone's matrices before expansion."""
    folder = huggingface_folder(config)
    if folder is None:
        architecture = decoder_architecture(config, config.data.length)
        return architecture.vocab_size, architecture.hidden_dim
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(values["vocab_size"]), int(values.get("hidden_size") or values["n_embd"])


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
            titles = ("image", f"{h} x {w} ids", f"reconstruction, {image.psnr:.1f} dB")
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
    rows = [(name, f"{size:,}") for name, size in zip(("text", "special", "image"), _sizes(vocab), strict=True)]
    rows.append(("all", f"{vocab.size:,} x {width:,}"))
    psnr = [(image.caption[:60], f"{image.psnr:.2f}", len(np.unique(image.ids_hw))) for image in images]
    tables = [text_table(("rows of both matrices", ""), rows)]
    return "\n\n".join([*tables, text_table(("image", "PSNR (dB)", "distinct ids"), psnr)])


def _sizes(vocab: JointVocab) -> tuple[int, int, int]:
    return vocab.text_size, len(SPECIALS), vocab.image_size


def image_tokenizer_sentence(run: Run) -> str:
    """The image tokenizer of a run by path and hash."""
    sha256 = (run.environment.get("tokenizers") or {}).get("image")
    words = f"Image tokenizer: {run.config['image_tokenizer']['path']}"
    return f"{words}, sha256 {sha256[:12]}." if sha256 else f"{words}."

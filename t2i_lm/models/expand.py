"""Expansion of a decoder's embedding and output by special and image rows (Section 2.1).

Shapes: `I` image codes, `E` code width, `D` width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.decoder import fan_in_normal_
from t2i_lm.models.token_rows import TokenRows
from t2i_lm.tokenizers.joint_vocab import SPECIALS, JointVocab
from t2i_lm.tokenizers.words import phrase_rows

# Share of the random rows that `mean_rows` adds, so that no two rows start equal.
MEAN_NOISE = 0.01


@dataclass(frozen=True)
class ImageRowSource:
    """Non-random initial values of the image rows.

    Attributes:
        codebook_IE: the image tokenizer's code vectors.
        aligned_ID: embedding rows of a contrastive run (Section 3.2).
        pieces: text ids of the words of each code; a code without words has none.
    """

    codebook_IE: Tensor | None = None
    aligned_ID: Tensor | None = None
    pieces: Sequence[Sequence[int]] | None = None


# Changes randomly initialized rows (rows, D) in place: (rows, matrix, whether it is the embedding, source, generator).
RowRule = Callable[[Tensor, TokenRows, bool, ImageRowSource, Generator], None]


def random_rows(rows: Tensor, *_: object) -> None:
    """open_lm's own random initialization, unchanged."""


def mean_rows(rows: Tensor, matrix: TokenRows, *_: object) -> None:
    """The mean of the text rows plus `MEAN_NOISE` times the random rows."""
    rows.mul_(MEAN_NOISE).add_(matrix.text.mean(dim=0))


def codebook_rows(
    rows_ID: Tensor, matrix: TokenRows, embedding: bool, source: ImageRowSource, generator: Generator
) -> None:
    """Code vectors, standardized and randomly projected to the random rows' scale: near codes get near rows."""
    assert source.codebook_IE is not None
    codes_IE = source.codebook_IE.to(rows_ID)
    codes_IE = (codes_IE - codes_IE.mean(dim=0)) / codes_IE.std(dim=0).clamp(min=1e-6)
    projection_DE = rows_ID.new_empty(rows_ID.shape[1], codes_IE.shape[1])
    fan_in_normal_(projection_DE, generator)
    rows_ID.copy_(codes_IE @ projection_DE.T / rows_ID.shape[1] ** 0.5)


def aligned_rows(rows_ID: Tensor, matrix: TokenRows, embedding: bool, source: ImageRowSource, *_: object) -> None:
    """Rows of a contrastive run in the embedding; the output, which it does not train, stays random."""
    assert source.aligned_ID is not None
    if embedding:
        rows_ID.copy_(source.aligned_ID)


def word_rows(rows_ID: Tensor, matrix: TokenRows, embedding: bool, source: ImageRowSource, *_: object) -> None:
    """Mean text row of a code's words, plus `MEAN_NOISE` times its random row; without words, its random row.

    The noise tells codes of equal words apart.
    """
    assert source.pieces is not None
    named_I = torch.tensor([len(pieces) > 0 for pieces in source.pieces], device=rows_ID.device)
    words_ID = phrase_rows(matrix.text, source.pieces) + MEAN_NOISE * rows_ID
    rows_ID.copy_(torch.where(named_I[:, None], words_ID, rows_ID))


# `new_rows` -> initialization of the image rows. Special rows stay random except under `mean`.
ROW_RULES: dict[str, RowRule] = {
    "random": random_rows,
    "mean": mean_rows,
    "codebook": codebook_rows,
    "aligned": aligned_rows,
    "words": word_rows,
}


@torch.no_grad()
def expand_vocabulary(
    decoder: Backbone,
    image_size: int,
    generator: Generator,
    new_rows: str = "random",
    source: ImageRowSource | None = None,
) -> JointVocab:
    """Adds rows for `SPECIALS` and `image_size` codes, initialized as open_lm initializes its own.

    The random rows depend on the generator alone: decoders expanded with equal generators get identical new rows,
    regardless of their other weights (`mean` and `words` add means of text rows). Existing rows are unchanged, and a
    tied decoder stays tied.

    Args:
        decoder: not yet expanded.
        image_size: image codes I.
        generator: of the random rows.
        new_rows: one of `ROW_RULES`.
        source: initial values for `codebook`, `aligned` and `words`.

    Raises:
        ValueError: if the decoder is already expanded, or the source's rows have another shape.
    """
    if decoder.output.image is not None:
        raise ValueError("the decoder's vocabulary is already expanded")
    vocab = JointVocab(decoder.config.vocab_size, image_size)
    dim = decoder.config.hidden_dim
    source = source or ImageRowSource()
    aligned_ID = source.aligned_ID
    if aligned_ID is not None and aligned_ID.shape != (image_size, dim):
        raise ValueError(f"aligned rows have shape {tuple(aligned_ID.shape)}, expected {(image_size, dim)}")
    assert source.pieces is None or len(source.pieces) == image_size
    matrices: list[TokenRows] = [decoder.tok_embeddings, decoder.output]
    untied = matrices[:1] if decoder.config.weight_tying else matrices
    for matrix in untied:
        for name, count in (("special", len(SPECIALS)), ("image", image_size)):
            rows = nn.Parameter(matrix.text.new_empty(count, dim))
            fan_in_normal_(rows, generator)
            setattr(matrix, name, rows)
    for matrix in untied:  # after all random rows, so that a rule does not shift the generator for the next
        for name in ("special", "image") if new_rows == "mean" else ("image",):
            rule = ROW_RULES[new_rows]
            rule(getattr(matrix, name), matrix, matrix is decoder.tok_embeddings, source, generator)
    if decoder.config.weight_tying:
        decoder.output.special, decoder.output.image = decoder.tok_embeddings.special, decoder.tok_embeddings.image
    return vocab

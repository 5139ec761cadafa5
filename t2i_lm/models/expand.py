"""Expanding a decoder's embedding and output by the special and image rows (Section 2.1)."""

import torch
from torch import Generator, nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.feed_forward import fan_in_normal_
from t2i_lm.models.token_rows import TokenRows
from t2i_lm.vocab import SPECIALS, JointVocab


@torch.no_grad()
def expand_vocabulary(decoder: Backbone, image_size: int, generator: Generator) -> JointVocab:
    """Adds rows for `SPECIALS` and `image_size` codes, drawn as open_lm draws its own.

    The draw depends on the generator alone, so two decoders expanded with equal generators get identical
    new rows whatever their other weights; old rows are not touched. A tied decoder stays tied.

    Raises:
        ValueError: if the decoder is expanded already.
    """
    if decoder.output.image is not None:
        raise ValueError("the decoder's vocabulary is expanded already")
    vocab = JointVocab(decoder.config.vocab_size, image_size)
    dim = decoder.config.hidden_dim
    matrices: list[TokenRows] = [decoder.tok_embeddings, decoder.output]
    for matrix in matrices:
        if decoder.config.weight_tying and matrix is decoder.output:
            matrix.special, matrix.image = decoder.tok_embeddings.special, decoder.tok_embeddings.image
            continue
        for name, rows in (("special", len(SPECIALS)), ("image", image_size)):
            weight = nn.Parameter(matrix.text.new_empty(rows, dim))
            fan_in_normal_(weight, generator)
            setattr(matrix, name, weight)
    return vocab

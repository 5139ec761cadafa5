"""Decoders of a few thousand parameters with seeded weights."""

from typing import Any

import torch

from t2i_lm.models.decoder import Decoder
from t2i_lm.models.open_lm import decoder_config

TINY = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 24, "vocab_size": 50}


def tiny_decoder(positional: str = "rotary", seed: int = 0, **changes: Any) -> Decoder:
    decoder = Decoder(decoder_config(TINY | {"positional_embedding_type": positional} | changes))
    decoder.reset_parameters(torch.Generator().manual_seed(seed))
    return decoder

"""Decoders of a few thousand parameters with seeded weights."""

from typing import Any

import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.image_tokenizer import ImageTokenizerConfig
from t2i_lm.config.sections import DataConfig, TextTokenizerConfig
from t2i_lm.experiment.build import ImageModel, open_image, open_text
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.open_lm import decoder_config
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.tokenizers.layout import Layout

TINY = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 24, "vocab_size": 50}


def tiny_decoder(positional: str = "rotary", seed: int = 0, **changes: Any) -> Decoder:
    decoder = Decoder(decoder_config(TINY | {"positional_embedding_type": positional} | changes))
    decoder.reset_parameters(torch.Generator().manual_seed(seed))
    return decoder


def image_model() -> ImageModel:
    """A decoder of the demo's width and vocabulary with the demo's tokenizers, and images of 20 ids."""
    decoder = tiny_decoder("rotary", seq_len=64, hidden_dim=256, n_heads=4, vocab_size=4096)
    layout = Layout(expand_vocabulary(decoder, 512, torch.Generator().manual_seed(0)), 20, 60)
    config = ExperimentConfig(
        data=DataConfig(length=60),
        text_tokenizer=TextTokenizerConfig("asset:lm_rotary/text_tokenizer.model"),
        image_tokenizer=ImageTokenizerConfig("asset:image_tokenizer"),
    )
    return ImageModel(
        config=config,
        module=TextToImageModule(decoder, config, layout),
        text=open_text(config),
        image=open_image(config),
        layout=layout,
    )

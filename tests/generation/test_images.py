"""Images as functions of prompt and seed, in any batch."""

import numpy as np
import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig, ImageTokenizerConfig, TextTokenizerConfig
from t2i_lm.experiment.build import ImageModel, open_image, open_text
from t2i_lm.generation.images import generate_codes, prepare_generation
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.tokenizers.layout import Layout
from tests.decoders import tiny_decoder as tiny


def test_rounded_weights_sample_the_same_codes_in_any_batch() -> None:
    """Captions of several lengths, at the demo's width."""
    decoder = tiny("rotary", seq_len=64, hidden_dim=256, n_heads=4)
    layout = Layout(expand_vocabulary(decoder, 512, torch.Generator().manual_seed(0)), 20, 60)
    config = ExperimentConfig(
        data=DataConfig(length=60),
        text_tokenizer=TextTokenizerConfig("asset:lm_rotary/text_tokenizer.model"),
        image_tokenizer=ImageTokenizerConfig("asset:image_tokenizer"),
    )
    model = ImageModel(
        config=config,
        module=TextToImageModule(decoder, config, layout),
        text=open_text(config),
        image=open_image(config),
        layout=layout,
    )
    prepare_generation(model, bf16=True, compiled=False)
    prompts = [torch.from_numpy(layout.prompt(np.arange(5 * number % 31))) for number in range(10)]
    together = generate_codes(model, prompts, range(10))
    for first, last in ((0, 1), (1, 3), (3, 8), (9, 10)):
        assert torch.equal(generate_codes(model, prompts[first:last], range(first, last)), together[first:last])

"""Images from captions: prompts, sampling, decoding.

Shapes: `B` images, `N` image tokens, `H`, `W` pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from t2i_lm.config.sections import SampleConfig
from t2i_lm.experiment.build import ImageModel
from t2i_lm.models.float8 import multiplies_in_float8
from t2i_lm.models.generate import Progress, Sampling, generate
from t2i_lm.runtime.devices import can_compile
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.layout import ImageLayout, Layout

ImageArray = np.ndarray[Any, np.dtype[np.uint8]]
# Images drawn together: what the key-value cache must hold.
DRAW_BATCH = 64
# Images decoded at once.
DECODE_BATCH = 8


def sampling_of(settings: SampleConfig) -> Sampling:
    """How an experiment's `samples` are drawn."""
    return Sampling(settings.temperature, settings.top_k, settings.top_p, settings.guidance)


def seeds_of(seed: int, count: int) -> list[int]:
    """One seed an image: the first images are the same however many are drawn."""
    return [seed * 1_000_003 + number for number in range(count)]


def prepare_drawing(model: ImageModel, bf16: bool, compiled: bool) -> None:
    """Makes drawing faster. An id that is drawn from two nearly equal probabilities may then be another.

    Args:
        model: changed in place.
        bf16: rounds the decoder's weights to bfloat16, half the memory to read for each token, as training in bfloat16
            has done at every step. Positions stay in float32.
        compiled: compiles what draws a token: it takes some seconds once, and pays off over a few hundred images.

    Raises:
        ValueError: if the backbone cannot be compiled.
    """
    decoder = model.decoder
    if bf16:
        round_weights(decoder)
    if compiled and can_compile("--compile"):
        decoder.compile_steps()


def round_weights(model: nn.Module) -> None:
    """Rounds all weights to bfloat16, and no buffer: positions stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()


def computing(model: ImageModel) -> dict[str, Any]:
    """How the model computes what it draws, as it is now: `weights`, `compiled` and `fp8` of a protocol card.

    `weights` joins the number formats by `+` where there are several.
    """
    decoder = model.decoder
    formats = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in decoder.parameters()})
    return {"weights": "+".join(formats), "compiled": decoder.generates_compiled, "fp8": multiplies_in_float8(decoder)}


def caption_layout(model: ImageModel) -> tuple[Layout, TextTokenizer]:
    """What captions are laid out and encoded with.

    Raises:
        ValueError: if the model draws without them.
    """
    if not isinstance(model.layout, Layout):
        raise ValueError(f"this is a run of task={model.config.task}, which draws without prompts")
    return model.layout, model.text


def caption_prompts(model: ImageModel, captions: Sequence[str]) -> list[Tensor]:
    """Joint ids of each caption up to `<image>`, cut to the text budget."""
    layout, text = caption_layout(model)
    return [torch.from_numpy(layout.prompt(np.array(text.encode(caption), dtype=np.int64))) for caption in captions]


def draw_captions(
    model: ImageModel,
    captions: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    on_token: Progress | None = None,
) -> list[ImageArray]:
    """Images (H, W, 3) uint8 for captions; by default sampled as the experiment says."""
    prompts = caption_prompts(model, captions)
    return decode(model, draw_codes(model, prompts, seeds, sampling, on_token))


def draw_uncaptioned(model: ImageModel, seeds: Sequence[int]) -> list[ImageArray]:
    """Images (H, W, 3) uint8 of an unconditional model, one a seed."""
    assert isinstance(model.layout, ImageLayout)
    return decode(model, draw_codes(model, [torch.from_numpy(model.layout.prompt())] * len(seeds), seeds))


def draw_codes(
    model: ImageModel,
    prompts: Sequence[Tensor],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    on_token: Progress | None = None,
) -> Tensor:
    """Image codes (B, N) after prompts of joint ids, `DRAW_BATCH` at once; progress is over all of them.

    All prompts end at the column of the longest that fits, so that each image is a function of its prompt and seed
    as far as `generate` can make it.
    """
    layout = model.layout
    null = end = None
    if isinstance(layout, Layout):
        null, end = torch.from_numpy(layout.prompt(np.empty(0, np.int64))), layout.prompt_budget
    sampling = sampling or sampling_of(model.config.samples)
    return generate(
        model.decoder, layout.vocab, prompts, layout.image_tokens, seeds, sampling, null, on_token, DRAW_BATCH, end
    )


def decode(model: ImageModel, codes_BN: Tensor) -> list[ImageArray]:
    """Images (H, W, 3) uint8 of image codes."""
    parts = (model.image.decode(part_BN) for part_BN in torch.split(codes_BN, DECODE_BATCH))
    return [image.permute(1, 2, 0).numpy() for images in parts for image in images]

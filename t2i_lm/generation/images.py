"""Generation of images: captions to prompts, prompts to image codes, codes to pixels.

Shapes: `B` images, `N` image tokens, `H`, `W` pixels.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
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
# Images generated together: sequences that the key-value cache must hold.
IMAGE_BATCH = 64
# Images decoded at once.
DECODE_BATCH = 8
# Products of a weight and an entry, over all images, from which compilation takes less time on a CPU than it saves:
# about 2,100 of the demo's images. It costs 2 CPU seconds with torch's caches of the same model, 10 with those of the
# machine, 26 without, and saves 7 ms of the demo's image (benchmarks/RESULTS.md).
CPU_COMPILE_PRODUCTS = 1e12
# Characters by which a caption is recognized in messages and file names.
CAPTION_START = 40


def sampling_of(settings: SampleConfig) -> Sampling:
    """The sampling that an experiment's `samples` keys name."""
    return Sampling(settings.temperature, settings.top_k, settings.top_p, settings.guidance)


def chosen_sampling(
    model: ImageModel,
    temperature: float | None = None,
    top_k: float | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    log: bool = True,
) -> Sampling:
    """The run's sampling with some of its fields replaced; None keeps a field.

    With `log`, prints a note on guidance of a run without caption dropout.

    Raises:
        ValueError: naming a value out of range.
    """
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
    changes: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    sampling = replace(sampling_of(model.config.samples), **changes)
    data = model.config.data
    if log and sampling.guidance != 1 and not data.caption_dropout and data.text_ratio is None:  # that may empty some
        print(
            "note: this run was trained with data.caption_dropout=0, so guidance leads away from an empty caption that "
            "the model has never seen",
            file=sys.stderr,
        )
    return sampling


def seeds_of(seed: int, count: int) -> list[int]:
    """One seed per image; the first seeds are the same for every count."""
    return [seed * 1_000_003 + number for number in range(count)]


def prepare_generation(model: ImageModel, bf16: bool, compiled: bool, images: int) -> None:
    """Makes generation faster; where two ids are nearly equally likely, the other may then be sampled.

    Args:
        model: changed in place.
        bf16: rounds the decoder's weights to bfloat16, which halves the memory read per token; training in bfloat16
            rounds them so at every step. Positions stay in float32.
        compiled: compiles the step of one token; on a CPU only if there are enough images that this saves time, with a
            note on stderr otherwise.
        images: how many will be generated in all.

    Raises:
        ValueError: if the backbone cannot be compiled.
    """
    decoder = model.decoder
    if bf16:
        round_weights(decoder)
    if compiled and can_compile("--compile") and _compilation_pays(model, images):
        decoder.compile_steps()


def _compilation_pays(model: ImageModel, images: int) -> bool:
    """Whether compilation takes less time than it saves; by the size of the task alone, so that runs are repeatable."""
    if model.decoder.output.text.device.type != "cpu":
        return True
    weights = sum(parameter.numel() for parameter in model.decoder.parameters())
    enough = math.ceil(CPU_COMPILE_PRODUCTS / (weights * model.layout.image_tokens))
    if images < enough:
        print(
            f"--compile: nothing is compiled: on a CPU it saves time from about {enough:,} images of this model on, "
            f"not with {images:,}",
            file=sys.stderr,
        )
    return images >= enough


def round_weights(model: nn.Module) -> None:
    """Rounds all weights to bfloat16, but no buffer: positions stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()


def numerics(model: ImageModel) -> dict[str, Any]:
    """The numerics of generation with the model as it is: `weights`, `compiled` and `fp8` of a protocol card.

    `weights` joins several number formats by `+`.
    """
    decoder = model.decoder
    formats = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in decoder.parameters()})
    return {"weights": "+".join(formats), "compiled": decoder.generates_compiled, "fp8": multiplies_in_float8(decoder)}


def caption_layout(model: ImageModel) -> tuple[Layout, TextTokenizer]:
    """Sequence layout and tokenizer of captions.

    Raises:
        ValueError: if the model is unconditional.
    """
    if not isinstance(model.layout, Layout):
        raise ValueError(f"this is a run of task={model.config.task}, which generates images without prompts")
    return model.layout, model.text


def encode_captions(text: TextTokenizer, captions: Iterable[str]) -> list[list[int]]:
    """Ids of each caption, of which no space around it counts, as in training."""
    return text.encode_batch([caption.strip() for caption in captions])


def require_fitting(model: ImageModel, captions: Sequence[str]) -> None:
    """Checks that the sequence holds every caption whole.

    Raises:
        ValueError: if the model takes no captions, or naming the first caption that is too long.
    """
    layout, text = caption_layout(model)
    for caption, ids in zip(captions, encode_captions(text, captions), strict=True):
        if len(ids) > layout.text_budget:
            raise ValueError(
                f"prompt {caption[:CAPTION_START]!r}...: {len(ids)} ids, but at most {layout.text_budget} fit"
            )


def caption_prompts(model: ImageModel, captions: Sequence[str]) -> list[Tensor]:
    """Joint ids of each caption up to `<image>`, cut to the text budget."""
    layout, text = caption_layout(model)
    return [torch.from_numpy(layout.prompt(np.array(ids, dtype=np.int64))) for ids in encode_captions(text, captions)]


def generate_images(
    model: ImageModel,
    captions: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    on_token: Progress | None = None,
) -> list[ImageArray]:
    """Images (H, W, 3) uint8 of captions; the default sampling is the experiment's."""
    prompts = caption_prompts(model, captions)
    return decode(model, generate_codes(model, prompts, seeds, sampling, on_token))


def generate_unconditional(model: ImageModel, seeds: Sequence[int]) -> list[ImageArray]:
    """Images (H, W, 3) uint8 of an unconditional model, one per seed."""
    assert isinstance(model.layout, ImageLayout)
    return decode(model, generate_codes(model, [torch.from_numpy(model.layout.prompt())] * len(seeds), seeds))


def generate_codes(
    model: ImageModel,
    prompts: Sequence[Tensor],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    on_token: Progress | None = None,
) -> Tensor:
    """Image codes (B, N) that continue prompts of joint ids, `IMAGE_BATCH` at once; progress counts all of them.

    All prompts end at the column of the longest that fits, so that an image depends on its prompt and seed alone, as
    far as `generate` ensures it.
    """
    layout = model.layout
    null = end = None
    if isinstance(layout, Layout):
        null, end = torch.from_numpy(layout.prompt(np.empty(0, np.int64))), layout.prompt_budget
    sampling = sampling or sampling_of(model.config.samples)
    return generate(
        model.decoder, layout.vocab, prompts, layout.image_tokens, seeds, sampling, null, on_token, IMAGE_BATCH, end
    )


def decode(model: ImageModel, codes_BN: Tensor) -> list[ImageArray]:
    """Images (H, W, 3) uint8 of image codes."""
    parts = (model.image.decode(part_BN) for part_BN in torch.split(codes_BN, DECODE_BATCH))
    return [image.permute(1, 2, 0).numpy() for images in parts for image in images]

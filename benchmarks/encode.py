"""Encoding of images to ids in the forms of a convolutional encoder: float32, bfloat16, channels last, compiled.

The weights are random and the codes are latents of other images, so that neighboring codes are as close as they can be:
the share of equal ids is a lower bound of a trained tokenizer's.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.rounds import (
    OURS,
    Contender,
    GateError,
    Report,
    compare,
    compiles,
    exit_code,
    interleave,
    parser,
    rates,
)

if TYPE_CHECKING:
    from torch import Tensor

    from t2i_lm.tokenizers.vq import VQTokenizer

EXAMPLE = "python -m benchmarks.encode --shape movqgan_270m --batch 32"
# Arguments of diffusers' VQModel, and the side of the images in pixels.
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "movqgan_270m": ({"block_out_channels": (256, 512, 512, 1024), "num_vq_embeddings": 16_384}, 256),
    "movqgan_67m": ({"block_out_channels": (128, 256, 256, 512), "num_vq_embeddings": 16_384}, 256),
    "tiny": ({"block_out_channels": (32, 32), "num_vq_embeddings": 64}, 32),
}


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the arguments."""
    arguments = parser("encode", "Images to ids by an encoder of MoVQGAN's shape, with random weights.", EXAMPLE)
    arguments.add_argument("--shape", choices=SHAPES, default="movqgan_67m", help="default: %(default)s")
    arguments.add_argument("--batch", type=int, default=8, help="images at once (default: %(default)s)")
    given = arguments.parse_args(argv)
    if given.quick:
        given.shape, given.batch = "tiny", 2
    return given


def build(shape: str, device: str) -> VQTokenizer:
    """A tokenizer of a shape, with random weights on a device."""
    import torch
    from diffusers import VQModel

    from t2i_lm.tokenizers.vq import VQAutoencoder, VQTokenizer

    sizes, side = SHAPES[shape]
    levels = len(sizes["block_out_channels"])
    kinds = ["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"]
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = VQModel(
            down_block_types=kinds,
            up_block_types=[kind.replace("Down", "Up").replace("Encoder", "Decoder") for kind in reversed(kinds)],
            layers_per_block=2,
            latent_channels=4,
            vq_embed_dim=4,
            norm_type="spatial",
            **sizes,
        )
        tokenizer = VQTokenizer(VQAutoencoder(model), side, "")
        codes = tokenizer.model.codebook
        latents_BEhw = tokenizer.model.latents(torch.rand(2, 3, side, side) * 2 - 1)  # of noise images
        flat = latents_BEhw.permute(0, 2, 3, 1).flatten(0, 2)
        codes.data.copy_(flat[torch.randint(len(flat), (len(codes),))])
        return tokenizer


def forms(tokenizer: VQTokenizer, images_BCHW: Tensor, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Each form's encoding of a batch to ids."""
    import torch

    last = copy.deepcopy(tokenizer)
    last.model.to(memory_format=torch.channels_last)
    found: dict[str, Callable[[], Tensor]] = {
        "float32": partial(tokenizer.encode, images_BCHW),
        "bfloat16": partial(tokenizer.encode, images_BCHW, low_precision=True),
        "float32, channels last": partial(last.encode, images_BCHW),
        "bfloat16, channels last": partial(last.encode, images_BCHW, low_precision=True),
    }
    if compiled:
        fast = copy.deepcopy(last)
        fast.model.vq.encoder.compile()
        found["bfloat16, channels last, compiled"] = partial(fast.encode, images_BCHW, low_precision=True)
    return found


def check(encodings: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Share of ids of each form that equal float32's.

    Raises:
        GateError: if a form in float32 has other ids in one place of a thousand.
    """
    expected_BN = encodings["float32"]()
    shares = {name: float((encode() == expected_BN).double().mean()) for name, encode in encodings.items()}
    for name, share in shares.items():
        if name.startswith("float32") and share < 0.999:
            raise GateError(f"{name}: {share:.2%} of the ids are float32's: not timed")
    return shares


def measure(options: argparse.Namespace) -> None:
    """Checks, times, reports."""
    import torch

    report = Report("encode", options)
    with torch.no_grad():
        tokenizer = build(options.shape, options.device)
    side = tokenizer.image_size
    generator = torch.Generator().manual_seed(1)
    images_BCHW = torch.randint(256, (options.batch, 3, side, side), generator=generator, dtype=torch.uint8)
    encodings = forms(tokenizer, images_BCHW, compiles(options))
    shares = check(encodings)
    contenders = [Contender(name, OURS, encode) for name, encode in encodings.items()]
    seconds = interleave(contenders, options.rounds, warmup=1, device=options.device)
    report.write(
        gate=shares,
        equal_ids=shares,
        images_per_s=rates(seconds, options.batch),
        parameters=sum(parameter.numel() for parameter in tokenizer.model.parameters()),
        **compare(contenders, seconds),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code."""
    return exit_code(measure, options(argv))


if __name__ == "__main__":
    sys.exit(main())

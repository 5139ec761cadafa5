"""Vector-quantised image tokenizers on diffusers' `VQModel`.

Shapes: `B` pictures, `C` = 3 channels, `H`, `W` pixels, `h`, `w` the grid of ids, `N` = h * w, `E` code width.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i_lm.config import VQModelConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class PatchedVQ(nn.Module):
    """A `VQModel` behind a pixel-unshuffle of `patch`, which moves the work to low resolution."""

    def __init__(self, config: VQModelConfig) -> None:
        super().__init__()
        self.config = config
        channels, levels = 3 * config.patch**2, len(config.block_out_channels)
        self.vq: Any = VQModel(  # type: ignore[no-untyped-call]
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            num_vq_embeddings=config.codes,
            vq_embed_dim=config.code_dim,
            norm_num_groups=16,
            mid_block_add_attention=False,
        )

    @property
    def downsampling(self) -> int:
        """Pixels a side of one id."""
        return int(self.config.patch * 2 ** (len(self.config.block_out_channels) - 1))

    @property
    def codebook(self) -> nn.Parameter:
        """Code vectors (codes, E)."""
        weight = self.vq.quantize.embedding.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def latents(self, pixels_BCHW: Tensor) -> Tensor:
        """Continuous latents (B, E, h, w) of pixels in [-1, 1]."""
        return self.vq.quant_conv(self.vq.encoder(F.pixel_unshuffle(pixels_BCHW, self.config.patch)))  # type: ignore[no-any-return]

    def nearest(self, latents_BEhw: Tensor) -> Tensor:
        """Id (B, h, w) of the nearest code, in float32."""
        flat = latents_BEhw.permute(0, 2, 3, 1).flatten(0, 2).float()
        codes = self.codebook.float()
        # |z - e|^2 without |z|^2, which does not change the order.
        distance = codes.square().sum(dim=1) - 2 * flat @ codes.T
        return distance.argmin(dim=1).view(latents_BEhw.shape[0], *latents_BEhw.shape[2:])

    def embed(self, ids_Bhw: Tensor) -> Tensor:
        """Code vectors (B, E, h, w) of ids."""
        return F.embedding(ids_Bhw, self.codebook).permute(0, 3, 1, 2)

    def pixels(self, latents_BEhw: Tensor) -> Tensor:
        """Pixels (B, C, H, W), about [-1, 1], of latents."""
        patches = self.vq.decoder(self.vq.post_quant_conv(latents_BEhw))
        return F.pixel_shuffle(patches, self.config.patch)


def to_unit(images_uint8_BCHW: Tensor) -> Tensor:
    """uint8 pixels -> [-1, 1]."""
    return images_uint8_BCHW.float() / 127.5 - 1


def to_uint8(pixels_BCHW: Tensor) -> Tensor:
    """[-1, 1] -> uint8 pixels, rounded and clamped."""
    return ((pixels_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class VQTokenizer:
    """A trained `PatchedVQ` as an image tokenizer, in float32.

    Attributes:
        sha256: of the weights file.
    """

    def __init__(self, model: PatchedVQ, image_size: int, sha256: str) -> None:
        if image_size % model.downsampling:
            raise ValueError(
                f"image_tokenizer.size={image_size}: expected a multiple of {model.downsampling}, the downsampling"
            )
        self.model = model.eval().requires_grad_(False)
        self.image_size, self.sha256 = image_size, sha256

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> "VQTokenizer":
        """Reads what `save_tokenizer` wrote.

        Raises:
            ValueError: if a file is absent or does not fit the config.
        """
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(f"image_tokenizer.path: no {name} in {folder}")
        config = json.loads((folder / CONFIG).read_text())
        model = PatchedVQ(VQModelConfig(**config["model"]))
        try:
            model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()})
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"image_tokenizer.path: {folder / WEIGHTS} does not fit its config: {error}") from error
        return cls(model, image_size, hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())

    @property
    def vocab_size(self) -> int:
        return self.model.config.codes

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.model.downsampling
        return side, side

    @torch.no_grad()
    def encode(self, images_uint8_BCHW: Tensor) -> Tensor:
        """Ids (B, N) int64, row-major, of uint8 pictures whose sides are multiples of the downsampling."""
        return self.model.nearest(self.model.latents(to_unit(images_uint8_BCHW))).flatten(1)

    @torch.no_grad()
    def decode(self, ids_BN: Tensor) -> Tensor:
        """uint8 pictures (B, C, H, W) of ids.

        Raises:
            ValueError: if an id is not a code or the number of ids does not fill the grid.
        """
        height, width = self.grid
        if ids_BN.shape[1] != height * width or ids_BN.min() < 0 or ids_BN.max() >= self.vocab_size:
            raise ValueError(
                f"expected {height * width} ids in [0, {self.vocab_size}), got {ids_BN.shape[1]} in "
                f"[{int(ids_BN.min())}, {int(ids_BN.max())}]"
            )
        return to_uint8(self.model.pixels(self.model.embed(ids_BN.view(-1, height, width))))


def save_tokenizer(model: PatchedVQ, folder: Path, dtype: torch.dtype) -> None:
    """Writes weights and config, which `VQTokenizer.from_folder` reads.

    Ids may change when weights are rounded to bfloat16, so a tokenizer is measured as it is shipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"model": vars(model.config)}, indent=2) + "\n")

"""Image tokenizers of `transformers` (extra `hf`): the VQ models of Emu3, Chameleon and Janus.

Shapes: `B` images, `C` = 3 channels, `H`, `W` pixels, `h`, `w` the grid of ids, `N` = h * w.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_lm.runtime.devices import exact_convolutions
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.reading import reason, require_regular
from t2i_lm.tokenizers.vq import PixelRange, chosen_range, require_no_problem

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Kind:
    """A VQ model: its class in transformers, and the config key of its codebook size.

    `unused` are prefixes of tensors of a decoder that the class lacks.
    """

    model: str
    codes: str
    unused: tuple[str, ...] = ()


KINDS = {
    "emu3_vqgan": Kind("Emu3VQVAE", "codebook_size"),
    "chameleon_vqgan": Kind("ChameleonVQVAE", "num_embeddings", ("decoder.", "post_quant_conv.")),
    "janus_vqgan": Kind("JanusVQVAE", "num_embeddings"),
}


def is_transformers_vq(folder: Path) -> bool:
    """Whether a folder holds one of `KINDS`."""
    try:
        require_regular(folder / CONFIG)
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type") in KINDS
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def stated_range(folder: Path) -> PixelRange:
    """The pixel range that a folder's image processor makes of uint8 pixels; [-1, 1] where it has none.

    Raises:
        ValueError: if `preprocessor_config.json` is not JSON or states no increasing range.
    """
    file = folder / PREPROCESSOR
    if not file.is_file():
        return PixelRange(source=f"no {PREPROCESSOR}, the usual range")
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
        scale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        mean, std = [0.0], [1.0]
        if config.get("do_normalize", True):
            if "image_mean" not in config or "image_std" not in config:
                return PixelRange(source=f"{PREPROCESSOR} has no image_mean and image_std, the usual range")
            mean, std = (_channels(config[key]) for key in ("image_mean", "image_std"))
        pairs = list(zip(mean, std, strict=True))
        black, white = (tuple((value * scale - own) / by for own, by in pairs) for value in (0, 255))
    except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"image_tokenizer.path: {file} states no pixel range: {error}") from error
    if not all(low < high for low, high in zip(black, white, strict=True)):
        raise ValueError(f"image_tokenizer.path: {file} states {black} for black and {white} for white, expected more")
    return PixelRange(black, white, PREPROCESSOR)


def _channels(value: Any) -> list[float]:
    """One value per channel, or one of all."""
    return [float(own) for own in value] if isinstance(value, list) else [float(value)]


class TransformersVQ:
    """One of `KINDS` as an image tokenizer.

    Attributes:
        sha256: of the weights file, and of the pixel range where that is not [-1, 1].
        pixels: values of black and white.
        low_precision: whether to encode in bfloat16.
    """

    def __init__(self, folder: Path, image_size: int, pixel_range: Sequence[float] | None = None) -> None:
        """Loads a `save_pretrained` folder; `pixel_range` (black, white) replaces that of its image processor.

        Raises:
            ValueError: if it cannot be read, weights and config differ, or the image size is not a multiple of the
                downsampling.
        """
        try:
            import transformers
        except ImportError as error:
            raise ValueError(
                f"image_tokenizer.path={folder}: requires transformers: pip install 't2i_lm[hf]'"
            ) from error
        self._kind = KINDS[json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_type"]]
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"image_tokenizer.path: no {WEIGHTS} in {folder}")
        log: Any = transformers.utils.logging
        verbosity = log.get_verbosity()
        log.set_verbosity_error()  # no report of many lines, which errors here sum up
        try:
            self.model: Any
            self.model, found = getattr(transformers, self._kind.model).from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # safetensors and transformers raise types of their own
            raise ValueError(
                f"image_tokenizer.path: {folder} cannot be read by transformers: {reason(error)}"
            ) from error
        finally:
            log.set_verbosity(verbosity)
        # transformers draws missing tensors at random: ids would differ in every process. Unexpected ones belong to
        # another architecture than the config's, whose ids are others.
        require_no_problem(folder, "missing", found["missing_keys"])
        unexpected = [name for name in found["unexpected_keys"] if not name.startswith(self._kind.unused)]
        require_no_problem(folder, "unexpected", unexpected)
        self.model.eval().requires_grad_(False)
        self.pixels = chosen_range(pixel_range, PixelRange()) if pixel_range else stated_range(folder)
        self.image_size, self.low_precision = image_size, False
        self.sha256 = self.pixels.identity(file_sha256(folder / WEIGHTS))
        multiplier = 2 ** (len(self.model.config.channel_multiplier) - 1)
        if image_size % multiplier:
            raise ValueError(f"image_tokenizer.size={image_size}: expected a multiple of {multiplier}")
        self._side = image_size // multiplier
        if self._kind.model == "JanusVQVAE":  # into which it shapes ids to decode; else the grid of its config
            self.model.quantize.quant_state_dims = [self._side, self._side]

    @property
    def grid(self) -> tuple[int, int]:
        return self._side, self._side

    @property
    def vocab_size(self) -> int:
        return int(getattr(self.model.config, self._kind.codes))

    @property
    def codebook(self) -> Tensor:
        weight: Tensor = self.model.quantize.embedding.weight
        return weight.detach().float().cpu()

    @property
    def decodes(self) -> bool:
        """Whether the model has a decoder (Chameleon's is not part of transformers)."""
        return hasattr(self.model, "decode")

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    @torch.no_grad()
    @exact_convolutions()
    def encode(self, images_uint8_BCHW: Tensor, low_precision: bool = False) -> Tensor:
        pixels_BCHW = self.pixels.to_model(images_uint8_BCHW.to(self.model.device))
        sizes = {"image_sizes": [pixels_BCHW.shape[2:]] * len(pixels_BCHW)} if self._is_emu3 else {}
        with torch.autocast(pixels_BCHW.device.type, torch.bfloat16, enabled=low_precision or self.low_precision):
            tokens = self.model.encode(pixels_BCHW, **sizes).image_tokens
        ids = torch.stack(list(tokens)) if self._is_emu3 else tokens
        return ids.reshape(len(pixels_BCHW), -1).long()

    @torch.no_grad()
    @exact_convolutions()
    def decode(self, ids_BN: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) of ids.

        Raises:
            ValueError: if the model has no decoder.
        """
        if not self.decodes:
            raise ValueError(f"image_tokenizer.path: {self._kind.model} of transformers has no decoder")
        ids_BN = ids_BN.to(self.model.device)
        pixels_BCHW = self.model.decode(ids_BN.view(-1, *self.grid) if self._is_emu3 else ids_BN)
        if pixels_BCHW.shape[1] != 3:  # Janus returns channels last
            pixels_BCHW = pixels_BCHW.permute(0, 3, 1, 2)
        return self.pixels.to_uint8(pixels_BCHW).cpu()

    @property
    def _is_emu3(self) -> bool:
        return self._kind.model == "Emu3VQVAE"

"""Vector-quantized image tokenizers on diffusers' `VQModel`.

Shapes: `B` images, `C` = 3 channels, `H`, `W` pixels, `h`, `w` the grid of ids, `N` = h * w, `E` code width.
"""

import hashlib
import json
import pickle
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i_lm.config.image_tokenizer import GROUPS, VQModelConfig
from t2i_lm.runtime.devices import exact_convolutions
from t2i_lm.runtime.launch import local_rank
from t2i_lm.storage.hashing import file_sha256, files_sha256
from t2i_lm.storage.reading import reading, reason
from t2i_lm.storage.writing import atomic_file, write_atomic
from t2i_lm.tokenizers import movqgan
from t2i_lm.tokenizers.nearest_codes import ExactIds, by_cell, squared_distances

WEIGHTS, CONFIG = "model.safetensors", "config.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


class VQAutoencoder(nn.Module):
    """A diffusers `VQModel` behind a pixel-unshuffle of `patch` (1: none), which moves work to low resolution."""

    def __init__(self, vq: Any, patch: int = 1) -> None:
        super().__init__()
        self.vq, self.patch = vq, patch

    @property
    def downsampling(self) -> int:
        """Side of an id's patch in pixels."""
        return int(self.patch * 2 ** (len(self.vq.config.block_out_channels) - 1))

    @property
    def codebook(self) -> Tensor:
        """Code vectors (codes, E)."""
        weight = self.vq.quantize.embedding.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def latents(self, pixels_BCHW: Tensor) -> Tensor:
        """Continuous latents (B, E, h, w) of pixels in [-1, 1]."""
        return self.vq.quant_conv(self.vq.encoder(F.pixel_unshuffle(pixels_BCHW, self.patch)))  # type: ignore[no-any-return]

    def nearest(self, latents_BEhw: Tensor) -> Tensor:
        """Ids (B, h, w) of the nearest codes, computed in float32, also under autocast."""
        with torch.autocast(latents_BEhw.device.type, enabled=False):
            distance = squared_distances(by_cell(latents_BEhw.float()), self.codebook.float())
        return distance.argmin(dim=1).view(latents_BEhw.shape[0], *latents_BEhw.shape[2:])

    def embed(self, ids_Bhw: Tensor) -> Tensor:
        """Code vectors (B, E, h, w) of ids."""
        return F.embedding(ids_Bhw, self.codebook).permute(0, 3, 1, 2)

    def pixels(self, latents_BEhw: Tensor) -> Tensor:
        """Pixels (B, C, H, W), about [-1, 1], of latents."""
        # MoVQ's norms are modulated by the codes themselves.
        modulation = latents_BEhw if self.vq.config.norm_type == "spatial" else None
        patches = self.vq.decoder(self.vq.post_quant_conv(latents_BEhw), modulation)
        return F.pixel_shuffle(patches, self.patch)


class PatchedVQ(VQAutoencoder):
    """A small autoencoder from a config, with diffusers' random initialization."""

    def __init__(self, config: VQModelConfig) -> None:
        channels, levels = 3 * config.patch**2, len(config.block_out_channels)
        vq = VQModel(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            num_vq_embeddings=config.codes,
            vq_embed_dim=config.code_dim,
            norm_num_groups=GROUPS,
            mid_block_add_attention=False,
        )
        super().__init__(vq, config.patch)
        self.config = config

    def plain_state(self) -> dict[str, Tensor]:
        """Tensors of an equal `PatchedVQ`, by name: those of the files of a tokenizer."""
        return dict(self.state_dict())

    def codebook_state(self) -> dict[str, Tensor]:
        """Tensors that decide the codebook, by name."""
        return {"vq.quantize.embedding.weight": self.codebook}


class VQTokenizer:
    """An image tokenizer from a trained autoencoder, in float32.

    Attributes:
        exact: encodes an image again where float32 may have rounded to another id; None in tokenizers of other origin,
            whose ids depend on processor, batch size and threads in one cell of some thousands.
        sha256: of the weights file, with the words of the codes, and the pixel range where that is not [-1, 1].
        pixels: values of black and white.
        low_precision: whether to encode in bfloat16.
        words: of the codes, in order, where they were trained as words; else None.
    """

    words: list[str] | None = None
    exact: ExactIds | None = None

    def __init__(self, model: VQAutoencoder, image_size: int, sha256: str, pixels: "PixelRange | None" = None) -> None:
        self.pixels = pixels or PixelRange()
        if image_size % model.downsampling:
            raise ValueError(
                f"image_tokenizer.size={image_size}: expected a multiple of {model.downsampling}, the downsampling"
            )
        self.model = model.eval().requires_grad_(False)
        self.image_size, self.sha256 = image_size, self.pixels.identity(sha256)
        self.low_precision = False

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> "VQTokenizer":
        """Loads a `save_tokenizer` folder.

        Raises:
            ValueError: if a file is missing or does not match the config.
        """
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(f"image_tokenizer.path: no {name} in {folder}")
        with reading("image_tokenizer.path", folder / CONFIG):
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if not (isinstance(config, dict) and isinstance(config.get("model"), dict)):
                raise ValueError(
                    f"image_tokenizer.path: {folder / CONFIG} is not an image tokenizer's: it has no section model"
                )
            try:
                model = PatchedVQ(VQModelConfig(**config["model"]))
            except ValueError as error:
                raise ValueError(f"image_tokenizer.path: {folder / CONFIG} cannot be read: {error}") from error
            words = _checked_words(config.get("words"), model.config.codes, folder / CONFIG)
        try:
            model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()})
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"image_tokenizer.path: {folder / WEIGHTS} does not match its config: {reason(error)}"
            ) from error
        sha256 = file_sha256(folder / WEIGHTS)
        if words is not None:
            sha256 = hashlib.sha256(json.dumps([sha256, words]).encode()).hexdigest()
        tokenizer = cls(model, image_size, sha256)
        tokenizer.words, tokenizer.exact = words, ExactIds(model)
        return tokenizer

    @classmethod
    def from_diffusers(cls, folder: Path, image_size: int, pixel_range: Sequence[float] | None = None) -> "VQTokenizer":
        """Loads a folder in diffusers' format, with its own loader: old names, shards and `.bin` files too.

        Pixels are in [-1, 1], as in all of diffusers, unless `pixel_range` (black, white) is given.

        Raises:
            ValueError: if a file is missing or does not match the config, naming tensors that one of them lacks.
        """
        files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
        files = files or sorted(folder.glob("diffusion_pytorch_model*.bin"))
        if not files:
            raise ValueError(f"image_tokenizer.path: no {DIFFUSERS_WEIGHTS} in {folder}")
        whole = next((file for file in files if file.stem == "diffusion_pytorch_model"), None)
        options: dict[str, Any] = {}
        if whole is None and len(files) == 1:  # such as diffusion_pytorch_model.fp16.safetensors
            options["variant"] = files[0].stem.partition(".")[2]
        with reading("image_tokenizer.path", folder):
            vq, found = VQModel.from_pretrained(
                folder, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True, **options
            )
        for problem in ("missing", "unexpected"):
            require_no_problem(folder, problem, found[f"{problem}_keys"])
        if vq.config.in_channels != 3 or vq.config.out_channels != 3:
            raise ValueError(
                f"image_tokenizer.path: {folder} has in_channels={vq.config.in_channels}, out_channels="
                f"{vq.config.out_channels}; expected 3 of each, for RGB"
            )
        used = [whole] if whole else files
        sha256 = file_sha256(used[0]) if len(used) == 1 else files_sha256(used)
        pixels = chosen_range(pixel_range, PixelRange(source="diffusers' convention"))
        return cls(VQAutoencoder(vq.float()), image_size, sha256, pixels)

    @property
    def vocab_size(self) -> int:
        return len(self.model.codebook)

    @property
    def codebook(self) -> Tensor:
        return self.model.codebook.detach().float().cpu()

    @property
    def decodes(self) -> bool:
        return True

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.model.downsampling
        return side, side

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    @torch.no_grad()
    @exact_convolutions()
    def encode(self, images_uint8_BCHW: Tensor, low_precision: bool = False) -> Tensor:
        """Ids (B, N) int64, row-major, of uint8 images whose sides are multiples of the downsampling.

        `low_precision` runs the encoder in bfloat16, with distances to the codes in float32. Else ids are those of
        `exact`, where the tokenizer has it.
        """
        device, low_precision = self.model.codebook.device, low_precision or self.low_precision
        pixels_BCHW = self.pixels.to_model(images_uint8_BCHW.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            latents_BEhw = self.model.latents(pixels_BCHW).float()
        if self.exact is not None and not low_precision:
            return self.exact(pixels_BCHW, latents_BEhw).to(device)
        return self.model.nearest(latents_BEhw).flatten(1)

    @torch.no_grad()
    @exact_convolutions()
    def decode(self, ids_BN: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) of ids.

        Raises:
            ValueError: if an id is out of range or the ids do not fill the grid.
        """
        height, width = self.grid
        if ids_BN.shape[1] != height * width or ids_BN.min() < 0 or ids_BN.max() >= self.vocab_size:
            raise ValueError(
                f"expected {height * width} ids in [0, {self.vocab_size}), got {ids_BN.shape[1]} in "
                f"[{int(ids_BN.min())}, {int(ids_BN.max())}]"
            )
        ids_Bhw = ids_BN.view(-1, height, width).to(self.model.codebook.device)
        return self.pixels.to_uint8(self.model.pixels(self.model.embed(ids_Bhw))).cpu()


class MoVQGAN(VQTokenizer):
    """SBER's MoVQGAN: one of 16,384 codes per 8x8 pixels; 256 pixels are 1,024 ids (Section 2.1).

    Attributes:
        size_name: `67M`, `102M`, `270M`, or a description of other shapes.
    """

    size_name: str

    @classmethod
    def from_checkpoint(cls, path: str | Path, image_size: int = 256, expect: str | None = None) -> "MoVQGAN":
        """Loads SBER's own `.ckpt`; the model is inferred from the shapes.

        Args:
            path: the file, read with `weights_only=True`.
            image_size: side of the images in pixels, a multiple of 8.
            expect: `67M`, `102M` or `270M`; another model is refused. The download named 270M in SBER's README
                is the 67M model.

        Raises:
            ValueError: if the file cannot be read, is not a MoVQGAN, or not the expected one.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"image_tokenizer.path: no checkpoint at {path}")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            state = saved.get("state_dict", saved)
            movqgan.require_movqgan(state)
            config = movqgan.diffusers_config(state)
        except pickle.UnpicklingError as error:
            raise ValueError(f"image_tokenizer.path: {path} contains more than tensors and is not loaded") from error
        except (RuntimeError, EOFError, AttributeError, KeyError, ValueError) as error:
            raise ValueError(f"image_tokenizer.path: {path} is not a MoVQGAN checkpoint: {reason(error)}") from error
        name = movqgan.size_name(config)
        if expect is not None and name != expect:
            raise ValueError(f"image_tokenizer.expect={expect!r}: {path} is the {name} model")
        vq: Any = VQModel(**config)
        try:
            vq.load_state_dict(movqgan.to_diffusers(state, len(config["block_out_channels"])))
        except RuntimeError as error:
            raise ValueError(f"image_tokenizer.path: {path} is an incomplete MoVQGAN: {reason(error)}") from error
        averaged = sum(key.startswith(movqgan.AVERAGES) and tensor.ndim > 0 for key, tensor in state.items())
        if averaged and local_rank() == 0:
            print(f"image_tokenizer.path: {path}: {averaged} averaged tensors (EMA) are not used", file=sys.stderr)
        tokenizer = cls(VQAutoencoder(vq), image_size, file_sha256(path))
        tokenizer.size_name = name
        return tokenizer


def require_no_problem(folder: Path, problem: str, tensors: Collection[str]) -> None:
    """Raises a ValueError that names the `missing` or `unexpected` tensors of a folder, if there are any."""
    if names := sorted(tensors):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"image_tokenizer.path: {folder} has {problem} tensors: {', '.join(names[:3])}{more}")


def _checked_words(words: Any, codes: int, file: Path) -> list[str] | None:
    if words is not None and not (isinstance(words, list) and [type(word) for word in words] == [str] * codes):
        raise ValueError(f"image_tokenizer.path: {file}: words: expected a list of {codes} texts, one for each code")
    return words


def save_tokenizer(model: PatchedVQ, folder: Path, dtype: torch.dtype, words: Sequence[str] | None = None) -> None:
    """Writes weights and config for `VQTokenizer.from_folder`, with the words of the codes where they are words.

    Rounding weights to bfloat16 may change ids, so a tokenizer is measured as shipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.plain_state().items()}
    with atomic_file(folder / WEIGHTS) as file:
        save_file(state, file)
    content = {"model": vars(model.config)} | ({} if words is None else {"words": list(words)})
    write_atomic(folder / CONFIG, json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class PixelRange:
    """Values, by channel or of all, that a model takes for black and for white, and where that is stated."""

    black: tuple[float, ...] = (-1.0,)
    white: tuple[float, ...] = (1.0,)
    source: str = "by definition"

    @property
    def is_unit(self) -> bool:
        """Whether it is [-1, 1]."""
        values = ((-1.0, self.black), (1.0, self.white))
        return all(abs(value - expected) < 1e-6 for expected, channels in values for value in channels)

    def to_model(self, images_uint8_BCHW: Tensor) -> Tensor:
        """uint8 pixels -> the model's values, float32."""
        if self.is_unit:
            return to_unit(images_uint8_BCHW)
        black_C11, white_C11 = self._ends(images_uint8_BCHW.device)
        return black_C11 + images_uint8_BCHW.float() / 255 * (white_C11 - black_C11)

    def to_uint8(self, pixels_BCHW: Tensor) -> Tensor:
        """The model's values -> uint8 pixels, rounded and clamped."""
        if self.is_unit:
            return to_uint8(pixels_BCHW)
        black_C11, white_C11 = self._ends(pixels_BCHW.device)
        share_BCHW = (pixels_BCHW - black_C11) / (white_C11 - black_C11)
        return (share_BCHW.clamp(0, 1) * 255).round().to(torch.uint8)

    def identity(self, sha256: str) -> str:
        """Hash of a tokenizer by that of its weights: the same weights give other ids in another range."""
        if self.is_unit:
            return sha256
        return hashlib.sha256(json.dumps([sha256, self.black, self.white]).encode()).hexdigest()

    def __str__(self) -> str:
        ends = [" ".join(f"{value:g}" for value in sorted({*channels})) for channels in (self.black, self.white)]
        return f"black to white are [{ends[0]}, {ends[1]}] ({self.source})"

    def _ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        black, white = (torch.tensor(channels, device=device).view(-1, 1, 1) for channels in (self.black, self.white))
        return black, white


def chosen_range(given: Sequence[float] | None, stated: PixelRange) -> PixelRange:
    """The range of the key `image_tokenizer.pixel_range` where given, else the `stated` one."""
    if given is None:
        return stated
    return PixelRange((float(given[0]),), (float(given[1]),), "image_tokenizer.pixel_range")


def to_unit(images_uint8_BCHW: Tensor) -> Tensor:
    """uint8 pixels -> [-1, 1]."""
    return images_uint8_BCHW.float() / 127.5 - 1


def to_uint8(pixels_BCHW: Tensor) -> Tensor:
    """[-1, 1] -> uint8 pixels, rounded and clamped."""
    return ((pixels_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

"""Opening of image tokenizers: one table of formats, tried in order."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2i_lm.assets import resolve
from t2i_lm.config.sections import is_plugin
from t2i_lm.runtime.plugins import IMAGE_TOKENIZER, find_plugin, interface
from t2i_lm.storage.reading import reading, require_regular_files
from t2i_lm.tokenizers.base import ImageTokenizer
from t2i_lm.tokenizers.transformers_vq import TransformersVQ, is_transformers_vq
from t2i_lm.tokenizers.vq import CONFIG, MoVQGAN, VQTokenizer

# The file that makes a folder a pipeline of diffusers.
PIPELINE = "model_index.json"


@dataclass(frozen=True)
class ImageFormat:
    """Files of an image tokenizer.

    Attributes:
        recognizes: whether an existing path is of this format.
        open: (path, image size, required size of a MoVQGAN, pixel range) -> tokenizer.
        has_range: whether a pixel range may be given: its own files may be silent or wrong.
    """

    name: str
    recognizes: Callable[[Path], bool]
    open: Callable[[Path, int, str | None, Sequence[float] | None], ImageTokenizer]
    has_range: bool


def _diffusers_class(folder: Path) -> str | None:
    """The class that diffusers' config.json of a folder names; None without one."""
    file = folder / CONFIG
    if not file.is_file():
        return None
    with reading("image_tokenizer.path", file):
        content = json.loads(file.read_text(encoding="utf-8"))
        return str(content["_class_name"]) if "_class_name" in content else None


def _is_diffusers(folder: Path) -> bool:
    name = _diffusers_class(folder)
    if name is not None and name.rpartition(".")[2] != "VQModel":
        raise ValueError(f"image_tokenizer.path: {folder / CONFIG} is of a {name}; expected a VQModel")
    return name is not None


def _tokenizer_of_pipeline(folder: Path) -> Path:
    """Of a diffusers pipeline, the subfolder of its `VQModel` (`vqvae`, `movq`); another path as it is."""
    if not (folder / PIPELINE).is_file():
        return folder
    classes = {file.parent: _diffusers_class(file.parent) for file in sorted(folder.glob(f"*/{CONFIG}"))}
    found = [subfolder for subfolder, name in classes.items() if name and name.rpartition(".")[2] == "VQModel"]
    if len(found) != 1:
        parts = ", ".join(f"{subfolder.name} ({name})" for subfolder, name in classes.items()) or "nothing"
        raise ValueError(
            f"image_tokenizer.path: the pipeline {folder} holds {parts}; expected one VQModel, or the path of one"
        )
    return found[0]


FORMATS = (
    ImageFormat("movqgan", Path.is_file, lambda file, size, of, _: MoVQGAN.from_checkpoint(file, size, of), False),
    ImageFormat(
        "transformers", is_transformers_vq, lambda folder, size, _, ends: TransformersVQ(folder, size, ends), True
    ),
    ImageFormat(
        "diffusers", _is_diffusers, lambda folder, size, _, ends: VQTokenizer.from_diffusers(folder, size, ends), True
    ),
    ImageFormat("t2i_lm", Path.is_dir, lambda folder, size, *_: VQTokenizer.from_folder(folder, size), False),
)


def open_image_tokenizer(
    path: str | Path, image_size: int, expect: str | None = None, pixel_range: Sequence[float] | None = None
) -> ImageTokenizer:
    """The image tokenizer at a path, or of a plug-in.

    Args:
        path: a folder that `save_tokenizer` wrote, a folder of a diffusers `VQModel` or of a pipeline with one, a VQ
            model of transformers, or a MoVQGAN `.ckpt`; `asset:NAME`, `hf://...`, or a plug-in (`runtime/plugins.py`).
        image_size: side of the images in pixels.
        expect: required size of a MoVQGAN.
        pixel_range: values of black and white, of a folder of diffusers or transformers; None: as its files say.

    Raises:
        ValueError: if there is none, it cannot be read, or a plug-in cannot be used.
    """
    plugin = is_plugin(str(path))
    file = Path(path) if plugin else resolve(str(path), "image_tokenizer.path")
    if not plugin and not file.exists():
        raise ValueError(f"image_tokenizer.path={path}: no such file or folder")
    if not plugin and _is_part_of_folder(file):
        folder = str(path).rpartition("/")[0] or "."
        raise ValueError(f"image_tokenizer.path={path}: a file of a model's folder; set image_tokenizer.path={folder}")
    if expect is not None and not file.is_file():
        raise ValueError(f"image_tokenizer.expect={expect!r}: only a MoVQGAN checkpoint has a size, {file} is none")
    if plugin:
        _require_range(pixel_range is None, pixel_range, path)
        return _from_plugin(str(path), image_size)
    with reading("image_tokenizer.path", file):
        require_regular_files(file)
        file = _tokenizer_of_pipeline(file)
        known = next(known for known in FORMATS if known.recognizes(file))
    _require_range(pixel_range is None or known.has_range, pixel_range, path)
    with reading("image_tokenizer.path", file):
        return known.open(file, image_size, expect, pixel_range)


def _is_part_of_folder(file: Path) -> bool:
    """Whether a file is one of several of a tokenizer: only a MoVQGAN is a single one."""
    kept_with_config = file.suffix == ".bin" and (file.parent / CONFIG).is_file()
    return file.is_file() and (file.suffix in (".safetensors", ".json") or kept_with_config)


def _require_range(allowed: bool, pixel_range: Sequence[float] | None, path: str | Path) -> None:
    if not allowed:
        raise ValueError(
            f"image_tokenizer.pixel_range={list(pixel_range or ())}: expected null, {path} is no folder of diffusers "
            "or transformers and has a range of its own"
        )


def describe_pixels(image: ImageTokenizer) -> str:
    """One line: the values that the model takes for black and white, and where they are stated."""
    pixels = getattr(image, "pixels", None)
    return f"pixels of the image tokenizer: {'as its plug-in takes them' if pixels is None else pixels}"


def _from_plugin(value: str, image_size: int) -> ImageTokenizer:
    plugin = find_plugin(IMAGE_TOKENIZER, value, [known.name for known in FORMATS])
    with reading(plugin.where, plugin.argument or plugin.origin):
        image: ImageTokenizer = plugin.function(plugin.argument, image_size)
    plugin.require(image, interface(ImageTokenizer))
    return image

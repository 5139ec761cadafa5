"""The image tokenizer at a path, of whichever kind its files are."""

import json
from pathlib import Path

from t2i_lm.tokenizers.base import ImageTokenizer
from t2i_lm.tokenizers.transformers_vq import TransformersVQ, is_transformers_vq
from t2i_lm.tokenizers.vq import CONFIG, MoVQGAN, VQTokenizer


def open_image_tokenizer(path: Path, image_size: int, expect: str | None = None) -> ImageTokenizer:
    """The tokenizer at a path, of whichever kind its files are.

    Args:
        path: a folder that `save_tokenizer` wrote, a folder of a diffusers `VQModel` or of one of transformers'
            VQ models, or a MoVQGAN `.ckpt`.
        image_size: side of the images in pixels.
        expect: size of a MoVQGAN, checked.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    if not path.exists():
        raise ValueError(f"image_tokenizer.path={path}: no such file or folder")
    if path.is_file():
        return MoVQGAN.from_checkpoint(path, image_size, expect)
    if expect is not None:
        raise ValueError(f"image_tokenizer.expect={expect!r}: only a MoVQGAN checkpoint has a size, {path} is none")
    if is_transformers_vq(path):
        return TransformersVQ(path, image_size)
    if (path / CONFIG).is_file() and "_class_name" in json.loads((path / CONFIG).read_text()):
        return VQTokenizer.from_diffusers(path, image_size)
    return VQTokenizer.from_folder(path, image_size)

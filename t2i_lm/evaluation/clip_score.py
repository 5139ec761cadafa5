"""CLIP score of images and captions (Hessel et al., 2021) by a CLIP model of `transformers` (the extra `clip`).

100 times the cosine of both embeddings, as in torchmetrics' CLIPScore. Code in a repository is never run.

Shapes: `B` images, `H`, `W` pixels, `D` width of an embedding.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from t2i_lm.assets import resolve
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.hub import is_hub, require_model

# Weight files in the order in which `transformers` looks for them.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Images per pass.
BATCH = 32


class Clip:
    """CLIP model that scores images with captions.

    Attributes:
        card: identity of the model: `clip_model`, the hash of its weights, and one of its config, vocabulary and
            preprocessing.
    """

    def __init__(self, reference: str) -> None:
        """Reads a folder that `save_pretrained` wrote.

        Args:
            reference: a folder, or `hf://ORG/NAME[@REVISION]`.

        Raises:
            ValueError: if it is no CLIP model, lacks a tensor or cannot be read, or `transformers` is not installed.
        """
        try:
            import transformers
        except ImportError as error:
            raise ValueError("--clip requires transformers: pip install 't2i_lm[clip]'") from error
        folder = resolve(reference, "--clip")
        require_model(str(folder), "clip", f"--clip {reference}:")
        weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
        if weights is None:
            raise ValueError(f"--clip {reference}: expected {' or '.join(WEIGHTS)} in {folder}")
        library: Any = transformers
        try:
            self._model, info = library.CLIPModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            self._processor = library.CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"--clip {reference} cannot be read by transformers: {str(error)[:300]}") from error
        if info["missing_keys"]:
            raise ValueError(f"--clip {reference} lacks the tensor {sorted(info['missing_keys'])[0]}")
        self._model.eval().requires_grad_(False)
        self._positions = int(self._model.config.text_config.max_position_embeddings)
        self.card = {
            "clip_model": reference if is_hub(reference) else folder.resolve().name,
            "clip_sha256": file_sha256(weights),
            "clip_settings_sha256": _settings_sha256(folder),
        }

    def to(self, device: torch.device) -> None:
        """Moves the model; inputs are moved to its device."""
        self._model.to(device)

    @torch.no_grad()
    def __call__(self, images_uint8_BCHW: Tensor, captions: Sequence[str]) -> Tensor:
        """Scores (B,) float32 on the CPU; a caption that is too long is cut, and keeps its end-of-text token."""
        assert len(images_uint8_BCHW) == len(captions)
        parts = []
        for start in range(0, len(captions), BATCH):
            pixels = self._processor(images=list(images_uint8_BCHW[start : start + BATCH]), return_tensors="pt")
            texts = self._processor(
                text=list(captions[start : start + BATCH]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self._positions,
            )
            device = self._model.device
            image_BD = _unit(self._model.get_image_features(pixels["pixel_values"].to(device)))
            caption_BD = _unit(
                self._model.get_text_features(texts["input_ids"].to(device), texts["attention_mask"].to(device))
            )
            parts.append(100 * (image_BD * caption_BD).sum(dim=-1).float().cpu())
        return torch.cat(parts)


def _unit(output: Any) -> Tensor:
    """Embeddings (B, D) of length one; since 5.0 transformers returns more than the embedding."""
    features_BD: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    unit_BD: Tensor = features_BD / features_BD.norm(p=2, dim=-1, keepdim=True)
    return unit_BD


def _settings_sha256(folder: Path) -> str:
    """Hash of the names and contents of all JSON and text files: config, vocabulary, preprocessing."""
    files = sorted(file for pattern in ("*.json", "*.txt") for file in folder.glob(pattern))
    return hashlib.sha256("\n".join(f"{file.name}\0{file_sha256(file)}" for file in files).encode()).hexdigest()

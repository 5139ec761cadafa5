"""Safetensors files whose header holds the sha256 of their tensors."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from t2i_lm.storage.writing import atomic_file

SHA256 = "sha256"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes and syncs tensors, on the CPU, with their sha256 beside the metadata."""
    own = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(own, temporary, {**metadata, SHA256: tensors_sha256(own)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; one of an older version has no sha256.

    Raises:
        ValueError: naming the file, if it cannot be read, or its tensors differ from the sha256.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if metadata.get(SHA256, found := tensors_sha256(tensors)) != found:
        raise ValueError(f"{path} is damaged: its tensors differ from the sha256 in its header")
    return tensors, metadata


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

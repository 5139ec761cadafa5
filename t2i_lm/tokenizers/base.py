"""What the suite asks of a tokenizer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class TextTokenizer(Protocol):
    """Text <-> ids. `sha256` names the vocabulary in every result, `path` is its file.

    Whatever a text says, its ids are ordinary ones: `document_end` and other special ids never arise from it.
    """

    path: Path

    @property
    def document_end(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    sha256: str

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ImageTokenizer(Protocol):
    """Images <-> a grid of ids, row-major.

    `image_size` is the side in pixels of the images it is used on, `grid` the (height, width) of their ids,
    `decodes` whether ids can be turned back, `low_precision` whether it encodes in bfloat16.
    """

    image_size: int
    sha256: str
    low_precision: bool

    @property
    def vocab_size(self) -> int: ...

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def codebook(self) -> Tensor: ...  # code vectors (vocab_size, width), float32 on the CPU

    @property
    def decodes(self) -> bool: ...

    def to(self, device: torch.device) -> None: ...

    def encode(self, images_uint8_BCHW: Tensor, low_precision: bool = False) -> Tensor: ...

    def decode(self, ids_BN: Tensor) -> Tensor: ...

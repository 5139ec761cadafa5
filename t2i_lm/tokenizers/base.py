"""Protocols of the tokenizers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class TextTokenizer(Protocol):
    """Text <-> ids; `sha256` is that of its file at `path` and identifies the vocabulary in every result.

    Encoding never produces special ids such as `document_end`, for any text. A tokenizer may also have
    `document_start`, the id in front of every document; without it, a document follows the end of another one.
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
    """Images <-> a row-major grid of ids.

    `image_size` is the side of its images in pixels, `grid` the (height, width) of their ids, `decodes` whether it
    has a decoder, `low_precision` whether it encodes in bfloat16. A tokenizer may also have `words`, a text for each
    code that says what it shows, empty where it has none.
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

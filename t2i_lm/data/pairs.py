"""One captioned picture, and what a source of them offers."""

from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image


@dataclass(frozen=True)
class Pair:
    """A picture with its captions.

    Attributes:
        id: unique within its source.
        image: RGB picture of any size.
        captions: at least one.
        meaning: what a generated scene shows (JSON values); None for photographs.
    """

    id: str
    image: Image.Image
    captions: list[str]
    meaning: dict[str, Any] | None


class CaptionedSource(Protocol):
    """A sized sequence of pairs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

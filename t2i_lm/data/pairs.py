"""One captioned picture, and what sources of them offer."""

from collections.abc import Callable, Iterator
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


# Reads one pair, or raises `pictures.RejectedPairError`.
Sample = Callable[[], Pair]


class CaptionedSource(Protocol):
    """A sized sequence of pairs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...


class StreamedSource(Protocol):
    """Pairs that can only be read in order, in shards that can be read apart."""

    @property
    def shards(self) -> int: ...

    def shard(self, number: int) -> Iterator[Sample]: ...

"""A sharded checkpoint: a small main file, and a part per shard that its rank writes.

The main file is a checkpoint in which each sharded tensor is replaced by its number and shape. A part holds the rows of
one shard of all of them, in this order. The main file lists the parts with their digests and is written last, so that
its own digest covers them. Any number of ranks can read it, since the rows of the parts follow one another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from callbacks.files.nested import mapped

# Keys of the main file: its parts, and in place of a tensor the number of its rows in each part, and its shape.
PARTS, NUMBER, SHAPE = "__parts__", "__rows_of_parts__", "shape"
INFIX = ".part-"
Rows = dict[str, list[Tensor]]


@dataclass
class Shares:
    """What one rank holds of the sharded tensors in a checkpoint.

    Attributes:
        index, count: of the shard.
        writes: whether this rank writes it, of those with the same.
        rows: of each tensor, on this rank.
    """

    index: int = 0
    count: int = 0
    writes: bool = False
    rows: list[Tensor] = field(default_factory=list)

    def add(self, tensor: DTensor) -> dict[str, Any]:
        """Adds a tensor; what stands in its place."""
        mesh, places = tensor.device_mesh, tensor.placements
        assert all(isinstance(place, Replicate) or place == Shard(0) for place in places), places
        (dimension,) = (number for number, place in enumerate(places) if isinstance(place, Shard))
        coordinates = mesh.get_coordinate()
        assert coordinates is not None
        assert mesh.size() == dist.get_world_size(), "a mesh of all ranks"
        index, count = coordinates[dimension], mesh.size(dimension)
        assert not self.rows or (index, count) == (self.index, self.count), "one mesh"
        self.index, self.count = index, count
        self.writes = sum(coordinates) == index  # the first of all copies
        self.rows.append(tensor.to_local())
        return {NUMBER: len(self.rows) - 1, SHAPE: list(tensor.shape)}


def split(content: dict[str, Any]) -> tuple[dict[str, Any], Shares | None]:
    """The content of the main file but for the list of parts, and this rank's share; None if nothing is sharded."""
    shares = Shares()
    main = mapped(content, _is_sharded, shares.add)
    return main, shares if shares.rows else None


def gathered(content: dict[str, Any]) -> dict[str, Any]:
    """The content with whole tensors on the host; every rank must call it."""
    whole: dict[str, Any] = mapped(content, _is_sharded, lambda value: value.full_tensor().cpu())
    return whole


def _is_sharded(value: Any) -> bool:
    return isinstance(value, DTensor)


def read_checkpoint(
    path: Path, map_location: Any = "cpu", mmap: bool = False, only: str | None = None
) -> dict[str, Any]:
    """Reads a verified checkpoint, whole or in parts, with `weights_only=True`.

    Args:
        path: of the file, or of the main file.
        map_location: as for `torch.load`.
        mmap: whether tensors that are whole are read when they are used.
        only: the only entry to return; None for all.
    """
    content: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    parts = content.pop(PARTS, [])
    if only is not None:
        content = {only: content[only]}
    if not parts:
        return content
    rows: list[Rows] = [
        torch.load(path.with_name(name), map_location=map_location, weights_only=True, mmap=True) for name, _ in parts
    ]

    def whole(place: dict[str, Any]) -> Tensor:
        pieces = [part["rows"][place[NUMBER]] for part in rows]
        tensor = torch.cat(pieces)
        if list(tensor.shape) != place[SHAPE]:
            raise ValueError(f"{path}: the parts hold {list(tensor.shape)} of a tensor of shape {place[SHAPE]}")
        return tensor

    joined: dict[str, Any] = mapped(content, lambda value: isinstance(value, dict) and NUMBER in value, whole)
    return joined


def parts_of(path: Path) -> list[tuple[str, str]]:
    """Name and digest of each part that a verified main file lists."""
    listed: Sequence[Sequence[str]] = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(PARTS, [])
    return [(name, digest) for name, digest in listed]


def part_files(path: Path) -> list[Path]:
    """Parts of this checkpoint in its folder, also of killed saves."""
    return sorted(path.parent.glob(f"{path.name}{INFIX}*"))


def part_name(path: Path, index: int, count: int, digest: str = "") -> str:
    """Name of a part; with its digest, so that it replaces none of an older file of the same name."""
    ending = f"-{digest[:8]}" if digest else ""
    return f"{path.name}{INFIX}{index:05d}-of-{count:05d}{ending}"

"""A sharded checkpoint: a small main file, and a part per shard that its rank writes.

The main file is a checkpoint in which each sharded tensor is replaced by its number and shape. A part holds the rows of
one shard of all of them, in this order. The main file lists the parts with their digests and is written last, so that
its own digest covers them. Any number of ranks can read it, since the rows of the parts follow one another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
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
# Index of a shard, and the number of them: which rows of each tensor a rank holds.
ShardIndex = tuple[int, int]


def shard_of(tensor: DTensor) -> ShardIndex:
    """The shard of a tensor that this rank holds."""
    mesh, places = tensor.device_mesh, tensor.placements
    assert all(isinstance(place, Replicate) or place == Shard(0) for place in places), places
    (dimension,) = (number for number, place in enumerate(places) if isinstance(place, Shard))
    coordinates = mesh.get_coordinate()
    assert coordinates is not None
    return coordinates[dimension], mesh.size(dimension)


def rows_of(length: int, shard: ShardIndex) -> tuple[int, int]:
    """First row and end of a shard of a tensor with `length` rows, as `Shard(0)` cuts it."""
    index, count = shard
    size = -(-length // count)
    return min(index * size, length), min((index + 1) * size, length)


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
        coordinates = tensor.device_mesh.get_coordinate()
        assert coordinates is not None
        assert tensor.device_mesh.size() == dist.get_world_size(), "a mesh of all ranks"
        index, count = shard_of(tensor)
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

    joined: dict[str, Any] = mapped(content, _is_place, whole)
    return joined


@dataclass(frozen=True)
class LocalRows:
    """The rows of a tensor that one shard holds, in the files until they are used.

    Attributes:
        pieces: the rows in order, as parts of the checkpoint hold them.
        shape: of the whole tensor.
    """

    pieces: list[Tensor]
    shape: list[int]

    def copy_to(self, local: Tensor) -> None:
        """Copies the rows into a tensor of their shape."""
        start = 0
        for piece in self.pieces:
            local[start : start + len(piece)].copy_(piece)
            start += len(piece)
        assert start == len(local)


def read_share(path: Path, shard: ShardIndex) -> dict[str, Any]:
    """Reads what one shard needs of a verified checkpoint, whole or in parts, however many shards wrote it.

    Tensors of parts are `LocalRows` of the shard; of the parts that hold none of its rows, none is opened. Whole
    tensors are read when they are used.
    """
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    names = [name for name, _ in content.pop(PARTS, [])]

    @cache
    def rows(part: int) -> list[Tensor]:
        file = path.with_name(names[part])
        return list(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["rows"])

    def local(place: dict[str, Any]) -> LocalRows:
        shape, pieces = place[SHAPE], []
        for part, start, end in overlaps(shape[0], shard, len(names)):
            held = rows(part)[place[NUMBER]]
            first, last = rows_of(shape[0], (part, len(names)))
            if list(held.shape) != [last - first, *shape[1:]]:
                raise ValueError(
                    f"{path}: {names[part]} holds {list(held.shape)} of a tensor of shape {shape}, "
                    f"expected {last - first} rows"
                )
            pieces.append(held[start - first : end - first])
        return LocalRows(pieces, shape)

    share: dict[str, Any] = mapped(content, _is_place, local)
    return share


def overlaps(length: int, shard: ShardIndex, parts: int) -> Iterator[tuple[int, int, int]]:
    """The parts that hold rows of a shard: (part, first row, end), of a tensor with `length` rows."""
    first, last = rows_of(length, shard)
    for part in range(parts):
        start, end = rows_of(length, (part, parts))
        if max(first, start) < min(last, end):
            yield part, max(first, start), min(last, end)


def _is_place(value: Any) -> bool:
    return isinstance(value, dict) and NUMBER in value


def needed_parts(path: Path, shard: ShardIndex) -> list[tuple[str, str]]:
    """`parts_of`, but only those that hold rows of a shard."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    listed, needed = content.pop(PARTS, []), set[int]()

    def add(place: dict[str, Any]) -> None:
        needed.update(part for part, *_ in overlaps(place[SHAPE][0], shard, len(listed)))

    mapped(content, _is_place, add)
    return [(listed[part][0], listed[part][1]) for part in sorted(needed)]


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

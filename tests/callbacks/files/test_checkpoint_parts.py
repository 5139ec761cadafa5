"""A shard reads its own rows, however many shards wrote the checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks import CorruptCheckpointError, read_checkpoint
from callbacks.files.checkpoint_io import verify, write, write_part
from callbacks.files.checkpoint_parts import (
    NUMBER,
    PARTS,
    SHAPE,
    LocalRows,
    needed_parts,
    part_files,
    read_share,
    rows_of,
)

# Also fewer rows than shards, and no row.
SHAPES = [(7, 3), (5,), (2, 2), (1,), (0, 4), (12,)]


def tensors() -> list[Tensor]:
    """One of each shape, in which every value is another."""
    return [torch.arange(torch.Size(shape).numel()).view(shape) + 100.0 * n for n, shape in enumerate(SHAPES)]


def save(path: Path, parts: int) -> None:
    """Writes the tensors in so many parts, as the ranks of a mesh do."""
    listed = []
    for part in range(parts):
        rows = [tensor[slice(*rows_of(len(tensor), (part, parts)))].clone() for tensor in tensors()]
        listed.append(write_part(rows, path, part, parts))
    places: list[dict[str, Any]] = [{NUMBER: number, SHAPE: list(shape)} for number, shape in enumerate(SHAPES)]
    write({"state_dict": places, "step": torch.tensor(3), PARTS: listed}, path)


def local(rows: LocalRows) -> Tensor:
    tensor = torch.empty(sum(map(len, rows.pieces)), *rows.shape[1:])
    rows.copy_to(tensor)
    return tensor


@pytest.mark.parametrize("length", [0, 1, 2, 5, 7, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rows_are_cut_as_torch_cuts_them(length: int, count: int) -> None:
    chunks = list(torch.arange(length).chunk(count)) if length else []
    for index in range(count):
        expected = chunks[index].tolist() if index < len(chunks) else []
        assert list(range(*rows_of(length, (index, count)))) == expected


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_shares_of_any_number_of_shards_are_the_whole(tmp_path: Path, parts: int, count: int) -> None:
    path = tmp_path / "step.ckpt"
    save(path, parts)
    whole = read_checkpoint(path)
    shares = [read_share(path, (index, count)) for index in range(count)]
    for number, expected in enumerate(tensors()):
        assert torch.equal(whole["state_dict"][number], expected)
        pieces = [share["state_dict"][number] for share in shares]
        for index, piece in enumerate(pieces):
            assert piece.shape == list(expected.shape)
            assert len(local(piece)) == len(range(*rows_of(len(expected), (index, count))))
        assert torch.equal(torch.cat([local(piece) for piece in pieces]), expected)
    assert all(int(share["step"]) == 3 for share in shares)
    needed = {name for index in range(count) for name, _ in needed_parts(path, (index, count))}
    held = {name for index in range(parts) for name, _ in needed_parts(path, (index, parts))}
    assert needed == held  # together the shards read every part that has rows


def test_a_shard_reads_and_checks_the_parts_with_its_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "step.ckpt"
    save(path, 4)
    files = part_files(path)
    names = [name for name, _ in needed_parts(path, (0, 2))]
    assert names == [file.name for file in files[:2]]
    for file in files[2:]:
        file.unlink()
    verify(path, shard=(0, 2))
    assert torch.equal(local(read_share(path, (0, 2))["state_dict"][0]), tensors()[0][:4])
    with pytest.raises(CorruptCheckpointError, match="is missing"):
        verify(path, shard=(1, 2))
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="do not match its digest"):
        verify(path, shard=(0, 2))
    verify(path, shard=(0, 4))

"""Grids of samples: written with their captions, read back as cells."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_lm.generation.grid import captioned_grid, grid_cells, save_grid

CAPTIONS = ["a red disc", '"><script>', "", "two stars\non a line", "five"]
IMAGES = [np.full((8, 8, 3), 40 * number, np.uint8) for number in range(len(CAPTIONS))]


def test_a_saved_grid_is_read_back_with_its_captions(tmp_path: Path) -> None:
    save_grid(IMAGES, CAPTIONS, tmp_path / "grid.png")
    cells = grid_cells(tmp_path / "grid.png")
    assert [cell.caption for cell in cells] == CAPTIONS
    for cell, image in zip(cells, IMAGES, strict=True):
        assert np.unique(np.asarray(cell.image)).tolist() == np.unique(image).tolist()
    with Image.open(tmp_path / "grid.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(captioned_grid(IMAGES, CAPTIONS)))


def test_a_grid_without_captions_in_its_metadata_has_those_of_its_pixels(tmp_path: Path) -> None:
    captioned_grid(IMAGES, CAPTIONS).save(tmp_path / "grid.png")
    cells = grid_cells(tmp_path / "grid.png")
    assert len(cells) == len(CAPTIONS)
    assert {cell.caption for cell in cells} == {None}
    assert np.asarray(cells[0].caption_image).min() < 128


def test_another_image_has_no_cells_and_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "other.png")
    assert grid_cells(tmp_path / "other.png") == []
    (tmp_path / "damaged.png").write_bytes(b"no image")
    with pytest.raises(OSError, match="cannot identify"):
        grid_cells(tmp_path / "damaged.png")

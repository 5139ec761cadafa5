"""An image tokenizer that knows what a scene is: the code of a cell names its shape's color, kind and size.

The upper end of codes with meaning, on the grid of the demo's image tokenizer and with as many codes, of which it uses
392: `image_tokenizer.path=code:t2i_lm.data.scenes.oracle:open_oracle allow_code=true`.
"""

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i_lm.config.sections import require
from t2i_lm.data.scenes.checker import SceneReading, read_scene
from t2i_lm.data.scenes.scene import BACKGROUNDS, COLOURS, KINDS, SIZE, SIZES, Scene, SceneObject, render

CELL = 8  # side of a cell in pixels
SIDE = SIZE // CELL
CODES = 512
GROUNDS = tuple(BACKGROUNDS)
SHAPES = tuple(product(COLOURS, KINDS, SIZES))
# Cells of a shape, as rows and columns from the cell at the lower right of its center, which lies on a corner of cells:
# 2 x 2, or 4 x 4 without the corners, which show the ground. The first in reading order tells neighbors apart.
CELLS = {
    "small": tuple(product((-1, 0), repeat=2)),
    "large": tuple((row, column) for row, column in product(range(-2, 2), repeat=2) if {row, column} - {-2, 1}),
}


class SceneOracle:
    """Images of scenes <-> ids; the ids are a function of what `read_scene` reads.

    Ids: the ground's color in cells without a shape; else color, kind and size of the shape, whether the cell is below
    the horizon, and whether it is the shape's first one, so that neighboring equal shapes stay apart.

    Decoding draws each shape that has a first cell, on the grounds of its rows; a cell of a shape that no such
    shape covers becomes a square of its color.
    """

    vocab_size, grid = CODES, (SIDE, SIDE)
    decodes, low_precision = True, False
    sha256 = "scene-oracle-1"

    def __init__(self, image_size: int) -> None:
        require(
            image_size == SIZE, "image_tokenizer.size", image_size, f"{SIZE}, the side of scenes, with this tokenizer"
        )
        self.image_size = image_size

    @property
    def codebook(self) -> Tensor:
        """Features of each code (CODES, E): one-hot ground, color, kind, size, below the horizon, first cell."""
        columns = [*GROUNDS, *COLOURS, *KINDS, *SIZES, "below", "first"]
        features = torch.zeros(CODES, len(columns))
        for number, ground in enumerate(GROUNDS):
            features[number, columns.index(ground)] = 1
        for (number, shape), below, first in product(enumerate(SHAPES), (False, True), (False, True)):
            for word in (*shape, *below * ["below"], *first * ["first"]):
                features[_shape_id(number, below, first), columns.index(word)] = 1
        return features

    @property
    def words(self) -> list[str]:
        """Words of each code: its ground's color, or size, color and kind of its shape; none for unused codes."""
        words = [*GROUNDS, *[""] * (CODES - len(GROUNDS))]
        for (number, (colour, kind, size)), below, first in product(enumerate(SHAPES), (False, True), (False, True)):
            words[_shape_id(number, below, first)] = f"{size} {colour} {kind}"
        return words

    def to(self, device: torch.device) -> None:
        """No weights to move."""

    def encode(self, images_uint8_BCHW: Tensor, low_precision: bool = False) -> Tensor:
        """Ids (B, N) int64, row-major, of uint8 images of 64 x 64 pixels."""
        images_BHWC = images_uint8_BCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return torch.from_numpy(np.stack([scene_ids(read_scene(image)) for image in images_BHWC])).flatten(1)

    def decode(self, ids_BN: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) of ids.

        Raises:
            ValueError: if an id is out of range or the ids do not fill the grid.
        """
        require(ids_BN.shape[1] == SIDE * SIDE, "ids", ids_BN.shape[1], f"{SIDE * SIDE} of an image")
        require(int(ids_BN.min()) >= 0 and int(ids_BN.max()) < CODES, "ids", int(ids_BN.max()), f"0 to {CODES - 1}")
        images = [_image(ids_hw) for ids_hw in ids_BN.view(-1, SIDE, SIDE).cpu().numpy()]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def open_oracle(argument: str | None, image_size: int) -> SceneOracle:
    """The tokenizer, as a plug-in; it takes no argument."""
    require(argument is None, "image_tokenizer.path", argument, "no argument with this tokenizer")
    return SceneOracle(image_size)


def _shape_id(number: int, below: bool, first: bool) -> int:
    return len(GROUNDS) + 4 * number + 2 * below + first


def scene_ids(reading: Scene | SceneReading) -> Any:
    """Ids (SIDE, SIDE) of a scene, or of what is read from an image."""
    horizon = (reading.horizon or SIZE) // CELL
    ids_hw = np.empty((SIDE, SIDE), dtype=np.int64)
    ids_hw[:horizon] = GROUNDS.index(reading.background)
    if reading.floor is not None:
        ids_hw[horizon:] = GROUNDS.index(reading.floor)
    for shape in reading.objects:
        number = SHAPES.index((shape.colour, shape.kind, shape.size))
        cells = _cells(shape.size, round(shape.y / CELL), round(shape.x / CELL))
        for place, (row, column) in enumerate(cells):
            ids_hw[row, column] = _shape_id(number, row >= horizon, place == 0)
    return ids_hw


def _cells(size: str, row: int, column: int) -> list[tuple[int, int]]:
    """Rows and columns of a shape's cells within the image, the first one first; its center is at a corner of cells."""
    cells = [(row + down, column + right) for down, right in CELLS[size]]
    return [cell for cell in cells if min(cell) >= 0 and max(cell) < SIDE]


def _image(ids_hw: Any) -> Any:
    palette = np.array(list(BACKGROUNDS.values()), dtype=np.uint8)
    is_ground_hw = ids_hw < len(GROUNDS)
    number_hw, flags_hw = np.divmod(np.where(is_ground_hw, 0, ids_hw - len(GROUNDS)), 4)
    number_hw = number_hw.clip(max=len(SHAPES) - 1)  # codes that encoding never gives
    image_HW3 = _upscaled(palette[_grounds(ids_hw, is_ground_hw, flags_hw >= 2)])
    shapes: list[SceneObject] = []
    covered_hw = is_ground_hw.copy()
    for row, column in np.argwhere(~is_ground_hw & (flags_hw % 2 == 1)).tolist():
        colour, kind, size = SHAPES[number_hw[row, column]]
        down, right = CELLS[size][0]
        center = row - down, column - right
        for cell in _cells(size, *center):
            covered_hw[cell] |= number_hw[cell] == number_hw[row, column]
        shapes.append(SceneObject(colour, kind, size, CELL * center[1], CELL * center[0]))
    loose_HW = np.repeat(np.repeat(~covered_hw, CELL, axis=0), CELL, axis=1)
    colours = np.array([COLOURS[colour] for colour, _, _ in SHAPES], dtype=np.uint8)
    image_HW3[loose_HW] = _upscaled(colours[number_hw])[loose_HW]
    for shape in shapes:
        image_HW3 = _draw(image_HW3, shape)
    return image_HW3


def _upscaled(cells_hw3: Any) -> Any:
    return np.repeat(np.repeat(cells_hw3, CELL, axis=0), CELL, axis=1)


def _grounds(ids_hw: Any, is_ground_hw: Any, below_hw: Any) -> Any:
    """Number of each cell's ground: its own, or behind a shape that of the nearest row on its side of the horizon."""
    grounds_hw = np.where(is_ground_hw, ids_hw, -1)
    shown = {
        row: int(np.bincount(ids_hw[row][is_ground_hw[row]]).argmax()) for row in range(SIDE) if is_ground_hw[row].any()
    }
    for row in range(SIDE):
        if not is_ground_hw[row].all():
            below = bool(below_hw[row][~is_ground_hw[row]].mean() >= 0.5)
            # In the row itself; else toward the floor if below the horizon; else anywhere.
            order = sorted(shown, key=lambda known: (known != row, (known < row) == below, abs(known - row)))
            grounds_hw[row][~is_ground_hw[row]] = shown[order[0]] if order else 0
    return grounds_hw


def _draw(image_HW3: Any, shape: SceneObject) -> Any:
    """The image with a shape on it, anti-aliased as `render` does."""
    white, black = (
        np.asarray(render(Scene("single", ground, (shape,), None)), dtype=np.float64) for ground in ("white", "black")
    )
    lightest, darkest = (np.array(BACKGROUNDS[name], dtype=np.float64) for name in ("white", "black"))
    # What shows of the ground differs between the two.
    clear_HW1 = ((white - black) / (lightest - darkest)).mean(axis=-1, keepdims=True).clip(0, 1)
    return (clear_HW1 * image_HW3 + (1 - clear_HW1) * np.array(COLOURS[shape.colour])).round().astype(np.uint8)

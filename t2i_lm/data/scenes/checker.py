"""Checker of scenes: reads background, floor and shapes (color, kind, size, position) from pixels.

Exact on rendered scenes, tolerant of blur and of an image tokenizer's errors. Any image is accepted, so that the blobs
of a half-trained model count as wrong instead of raising an error.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from t2i_lm.data.scenes.scene import BACKGROUNDS, COLOURS, HORIZONS, KINDS, SIZE, SIZES, Scene, SceneObject, render

Image = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Cover = npt.NDArray[np.float64]

# Pixels at the left and right edges that show the ground alone.
MARGIN = 3
# Mean RGB distance from the two palette colors by which a floor must explain the edges better than one ground does.
FLOOR_GAIN = 3.0
# Rows on either side of a horizon where an image tokenizer may blend both grounds.
BLENDED = 2
# Euclidean RGB distance from the ground above which a pixel belongs to a shape.
FOREGROUND_DISTANCE = 55.0
# Regions of fewer pixels are artifacts, not shapes.
MINIMUM_AREA = 30
# Offsets in pixels, around a region's center, of the templates that it is compared with.
SHIFTS = (-2, -1, 0, 1, 2)
# Widths in pixels of the templates' Gaussian blurs: an image tokenizer softens corners, and a soft small cross is
# nearer to a sharp circle than to a sharp cross.
BLURS = (0.0, 1.0, 1.5)
# Pixels by which one shape must be left of, or above, another.
MINIMUM_OFFSET = 8


@dataclass(frozen=True)
class DetectedShape:
    """A shape read from an image; (x, y) is the center of its bounding box in pixels."""

    colour: str
    kind: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class SceneReading:
    """What is read from an image; `floor` and `horizon` (pixels from the top) are None without a floor."""

    background: str
    floor: str | None
    horizon: int | None
    objects: tuple[DetectedShape, ...]


def read_scene(image_HW3: Image) -> SceneReading:
    """Reads an image of 64 x 64 pixels.

    Raises:
        ValueError: on another shape or dtype.
    """
    if image_HW3.shape != (SIZE, SIZE, 3) or image_HW3.dtype != np.uint8:
        raise ValueError(f"expected uint8 pixels of shape {(SIZE, SIZE, 3)}, got {image_HW3.dtype} {image_HW3.shape}")
    pixels = image_HW3.astype(np.float64)
    background, floor, horizon, ground_H13 = _read_ground(pixels)
    distance = np.linalg.norm(pixels - ground_H13, axis=-1)
    labels, count = ndimage.label(distance > FOREGROUND_DISTANCE, structure=np.ones((3, 3)))
    objects = []
    for region in range(1, count + 1):
        mask = labels == region
        if mask.sum() >= MINIMUM_AREA:
            objects.append(_read_object(pixels, ground_H13, distance, mask, horizon))
    return SceneReading(background, floor, horizon, tuple(objects))


def _read_ground(pixels: Pixels) -> tuple[str, str | None, int | None, Pixels]:
    """Background, floor, horizon, and the ground's color in each row (H, 1, 3), from the left and right edges."""
    edges_HP3 = np.concatenate([pixels[:, :MARGIN], pixels[:, -MARGIN:]], axis=1)
    row_H3 = np.median(edges_HP3, axis=1)
    palette_G3 = np.array(list(BACKGROUNDS.values()), dtype=np.float64)
    cost_HG = np.linalg.norm(row_H3[:, None] - palette_G3, axis=-1)
    ground = int(cost_HG.mean(axis=0).argmin())
    best, chosen = cost_HG[:, ground].mean() - FLOOR_GAIN, (ground, ground, SIZE)
    for horizon in HORIZONS:
        above, below = cost_HG[:horizon].sum(axis=0), cost_HG[horizon:].sum(axis=0)
        upper, lower = int(above.argmin()), int(below.argmin())
        cost = (above[upper] + below[lower]) / SIZE
        if upper != lower and cost < best:
            best, chosen = cost, (upper, lower, horizon)
    upper, lower, horizon = chosen
    names = list(BACKGROUNDS)
    ground_H13 = np.empty((SIZE, 1, 3))
    for rows in (slice(0, horizon), slice(horizon, SIZE)):
        if horizon < SIZE or rows.start == 0:
            ground_H13[rows] = np.median(edges_HP3[rows].reshape(-1, 3), axis=0)
    if horizon == SIZE:
        return names[upper], None, None, ground_H13
    blend = slice(horizon - BLENDED, horizon + BLENDED)
    ground_H13[blend, 0] = row_H3[blend]
    return names[upper], names[lower], horizon, ground_H13


def check(image_HW3: Image, meaning: dict[str, Any], mentioned: frozenset[str]) -> dict[str, bool | None]:
    """Whether an image matches a scene, per attribute.

    `colour` requires every described color, `any_colour` one of them, `kind` every shape in its color, `size` every
    shape in its color and size; `relation` identifies the two shapes by color. A wrong color is therefore also a wrong
    kind, size and relation, and a wrong kind a wrong size. `size` requires the sizes of both shapes of a pair, even if
    the caption mentions only one. `floor` is checked for every caption: one that names no floor requires that there is
    none.

    `all` ignores additional shapes, even if the caption ends in "and nothing else", unless it states a number (`count`,
    groups only); it also ignores positions beyond `relation`. `exact` rejects additional shapes.

    Args:
        image_HW3: image of 64 x 64 pixels.
        meaning: `Scene.meaning()` of the scene that the caption describes.
        mentioned: attributes that the caption asserts; the others are not checked.

    Returns:
        For each check above and `background` True, False, or None where not checked; `all`: none of them is False;
        `exact`: `all`, and the number of shapes is the scene's.
    """
    reading = read_scene(image_HW3)
    described = meaning["objects"]
    colours = [item.colour for item in reading.objects]
    shapes = [(item.colour, item.kind) for item in reading.objects]
    sized = [(item.colour, item.kind, item.size) for item in reading.objects]
    result: dict[str, bool | None] = {
        "background": reading.background == meaning["background"] if "background" in mentioned else None,
        "floor": reading.floor == meaning["floor"],
        "colour": all(item["colour"] in colours for item in described),
        "any_colour": any(item["colour"] in colours for item in described),
        "kind": all((item["colour"], item["kind"]) in shapes for item in described),
        "size": all((item["colour"], item["kind"], item["size"]) in sized for item in described)
        if "size" in mentioned
        else None,
        "relation": _relation_holds(reading, meaning) if "relation" in mentioned else None,
        "count": len(reading.objects) == len(described) if "count" in mentioned else None,
    }
    everything = all(value for value in result.values() if value is not None)
    return {**result, "all": everything, "exact": everything and len(reading.objects) == len(described)}


def shares_right(results: Iterable[dict[str, bool | None]]) -> dict[str, dict[str, float]]:
    """For each key of `check`'s results: share `right`, its standard error `se`, and number of checked images `of`."""
    values: dict[str, list[bool]] = {}
    for result in results:
        for name, value in result.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    shares = {name: (sum(column) / len(column), len(column)) for name, column in values.items()}
    return {name: {"right": right, "se": share_error(right, of), "of": of} for name, (right, of) in shares.items()}


def share_error(share: float, of: int) -> float:
    """Binomial standard error of a share; 0 where all or none are right, although the share is not certain then."""
    return math.sqrt(share * (1 - share) / of)


def _relation_holds(reading: SceneReading, meaning: dict[str, Any]) -> bool:
    first, second = (
        [shape for shape in reading.objects if shape.colour == item["colour"]] for item in meaning["objects"]
    )
    axis = "x" if meaning["arrangement"] == "left" else "y"
    return any(getattr(a, axis) + MINIMUM_OFFSET < getattr(b, axis) for a in first for b in second)


def _read_object(pixels: Pixels, ground_H13: Pixels, distance: Cover, mask: Mask, horizon: int | None) -> DetectedShape:
    near = ndimage.binary_dilation(mask, iterations=2)
    # Its inner pixels: those as far from their ground as the shape is, on either side of a horizon.
    inner = np.zeros_like(mask)
    for rows in (slice(0, horizon), slice(horizon, SIZE) if horizon is not None else slice(0, 0)):
        if mask[rows].any():
            inner[rows] = near[rows] & (distance[rows] > 0.9 * np.percentile(distance[rows][mask[rows]], 90))
    fill = np.median(pixels[inner], axis=0)
    # Coverage of each pixel: distance from the local ground, relative to the shape's own.
    contrast_H1 = np.linalg.norm(fill - ground_H13, axis=-1).clip(1.0)
    cover = np.where(near, np.minimum(distance / contrast_H1, 1.0), 0.0)
    rows_inside, columns_inside = np.nonzero(cover > 0.5)
    if not rows_inside.size:
        rows_inside, columns_inside = np.nonzero(mask)
    y, x = (rows_inside.min() + rows_inside.max() + 1) / 2, (columns_inside.min() + columns_inside.max() + 1) / 2
    window = _window(cover, round(x), round(y))
    names, templates, norms = _templates()
    kind, size = names[int((norms - 2 * templates @ window.ravel()).argmin())]  # least squares
    return DetectedShape(_nearest(fill, COLOURS), kind, size, float(x), float(y))


_HALF = 20  # half a window's width, in pixels


def _window(cover: Cover, x: int, y: int) -> Cover:
    padded = np.pad(cover, _HALF)
    return padded[y : y + 2 * _HALF, x : x + 2 * _HALF]


@cache
def _templates() -> tuple[list[tuple[str, str]], Cover, Cover]:
    """Kinds and sizes (n), rendered coverage (n, window * window), its squared norms (n); at every shift and blur."""
    center = SIZE // 2
    names, covers = [], []
    for kind, size in product(KINDS, SIZES):
        scene = Scene("single", "white", (SceneObject("blue", kind, size, center, center),), None)
        pixels = np.asarray(render(scene), dtype=np.float64)
        distance = np.linalg.norm(pixels - pixels[0, 0], axis=-1)
        for blur, dx, dy in product(BLURS, SHIFTS, SHIFTS):
            cover = ndimage.gaussian_filter(distance / distance.max(), blur)
            names.append((kind, size))
            covers.append(_window(cover, center + dx, center + dy).ravel())
    templates = np.stack(covers)
    return names, templates, np.square(templates).sum(axis=1)


def _nearest(colour: npt.NDArray[np.float64], palette: dict[str, tuple[int, int, int]]) -> str:
    names = list(palette)
    distances = np.linalg.norm(np.array([palette[name] for name in names], dtype=np.float64) - colour, axis=1)
    return names[int(distances.argmin())]

"""Checker of scenes: reads background and shapes (color, kind, size, position) from pixels.

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

from t2i_lm.data.scenes.scene import BACKGROUNDS, COLOURS, KINDS, SIZE, SIZES, Scene, SceneObject, render

Image = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Cover = npt.NDArray[np.float64]

# Euclidean RGB distance from the background above which a pixel belongs to a shape.
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
    """Background and shapes read from an image."""

    background: str
    objects: tuple[DetectedShape, ...]


def read_scene(image_HW3: Image) -> SceneReading:
    """Reads an image of 64 x 64 pixels.

    Raises:
        ValueError: on another shape or dtype.
    """
    if image_HW3.shape != (SIZE, SIZE, 3) or image_HW3.dtype != np.uint8:
        raise ValueError(f"expected uint8 pixels of shape {(SIZE, SIZE, 3)}, got {image_HW3.dtype} {image_HW3.shape}")
    pixels = image_HW3.astype(np.float64)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    background = _nearest(ground, BACKGROUNDS)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    labels, count = ndimage.label(distance > FOREGROUND_DISTANCE, structure=np.ones((3, 3)))
    objects = []
    for region in range(1, count + 1):
        mask = labels == region
        if mask.sum() >= MINIMUM_AREA:
            objects.append(_read_object(pixels, distance, mask))
    return SceneReading(background, tuple(objects))


def check(image_HW3: Image, meaning: dict[str, Any], mentioned: frozenset[str]) -> dict[str, bool | None]:
    """Whether an image matches a scene, per attribute.

    `colour` requires every described color, `any_colour` one of them, `kind` every shape in its color, `size` every
    shape in its color and size; `relation` identifies the two shapes by color. A wrong color is therefore also a wrong
    kind, size and relation, and a wrong kind a wrong size. `size` requires the sizes of both shapes of a pair, even if
    the caption mentions only one.

    `all` ignores additional shapes, even if the caption ends in "and nothing else", unless it states a number (`count`,
    groups only); it also ignores positions beyond `relation`. `exact` rejects additional shapes.

    Args:
        image_HW3: image of 64 x 64 pixels.
        meaning: `Scene.meaning()` of the scene that the caption describes.
        mentioned: attributes that the caption asserts; the others are not checked.

    Returns:
        For each check above and `background` True, False, or None where not mentioned; `all`: none of them is False;
        `exact`: `all`, and the number of shapes is the scene's.
    """
    reading = read_scene(image_HW3)
    described = meaning["objects"]
    colours = [item.colour for item in reading.objects]
    shapes = [(item.colour, item.kind) for item in reading.objects]
    sized = [(item.colour, item.kind, item.size) for item in reading.objects]
    result: dict[str, bool | None] = {
        "background": reading.background == meaning["background"] if "background" in mentioned else None,
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


def _read_object(pixels: npt.NDArray[np.float64], distance: npt.NDArray[np.float64], mask: Mask) -> DetectedShape:
    # Coverage of each pixel: distance from the background color, relative to the shape's own.
    peak = np.percentile(distance[mask], 90)
    near = ndimage.binary_dilation(mask, iterations=2)
    colour = _nearest(np.median(pixels[near & (distance > 0.9 * peak)], axis=0), COLOURS)
    cover = np.where(near, np.minimum(distance / peak, 1.0), 0.0)
    rows, columns = np.nonzero(cover > 0.5)
    y, x = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
    window = _window(cover, round(x), round(y))
    names, templates, norms = _templates()
    kind, size = names[int((norms - 2 * templates @ window.ravel()).argmin())]  # least squares
    return DetectedShape(colour, kind, size, float(x), float(y))


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

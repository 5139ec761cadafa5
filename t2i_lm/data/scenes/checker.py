"""Reads a scene back from pixels: background, and each shape's colour, kind, size and place.

Exact on rendered scenes, tolerant of blur and of an image tokenizer's errors; any image is accepted, so
that a half-trained model's blobs count as wrong and never as a crash.
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
# Smaller regions, in pixels, are artefacts and not shapes.
MINIMUM_AREA = 30
# Template matching looks this many pixels around a region's center.
SHIFTS = (-2, -1, 0, 1, 2)
# Templates are also compared blurred, by Gaussians of these widths in pixels: an image tokenizer softens corners, and
# a soft small cross is nearer to a sharp circle than to a sharp cross.
BLURS = (0.0, 1.0, 1.5)
CHECKS = ("background", "colour", "any_colour", "kind", "size", "relation", "count")


@dataclass(frozen=True)
class FoundObject:
    """A shape read from an image; x and y are its region's bounding-box center in pixels."""

    colour: str
    kind: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class SceneReading:
    """What an image shows, as far as the checker can tell."""

    background: str
    objects: tuple[FoundObject, ...]


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
    """Whether an image shows what was asked, per attribute.

    `colour` asks for every described colour, `any_colour` for one of them, `kind` for every shape in its colour, `size`
    for every shape in its colour and size; `relation` finds the two shapes by their colours. So a wrong colour is a
    wrong kind, size and relation too, and a wrong kind a wrong size.

    What `all` does not judge: further shapes, unless the caption gives a number (`count`; those of groups alone do),
    even where it closes with "and nothing else"; and where shapes lie, beyond `relation`. `exact` refuses further
    shapes. `size` asks for the sizes of both shapes of a pair, even where the caption gives one.

    Args:
        image_HW3: image of 64 x 64 pixels.
        meaning: `Scene.meaning()` of what was asked.
        mentioned: attributes that the caption asserts; the others are not judged.

    Returns:
        For each of `CHECKS` True, False, or None where the caption does not ask; `all` whether none of them is False,
        `exact` whether there are also exactly as many shapes as described.
    """
    reading = read_scene(image_HW3)
    asked = meaning["objects"]
    colours = [item.colour for item in reading.objects]
    shapes = [(item.colour, item.kind) for item in reading.objects]
    sized = [(item.colour, item.kind, item.size) for item in reading.objects]
    result: dict[str, bool | None] = {
        "background": reading.background == meaning["background"] if "background" in mentioned else None,
        "colour": all(item["colour"] in colours for item in asked),
        "any_colour": any(item["colour"] in colours for item in asked),
        "kind": all((item["colour"], item["kind"]) in shapes for item in asked),
        "size": all((item["colour"], item["kind"], item["size"]) in sized for item in asked)
        if "size" in mentioned
        else None,
        "relation": _relation_holds(reading, meaning) if "relation" in mentioned else None,
        "count": len(reading.objects) == len(asked) if "count" in mentioned else None,
    }
    everything = all(value for value in result.values() if value is not None)
    return {**result, "all": everything, "exact": everything and len(reading.objects) == len(asked)}


def shares_right(results: Iterable[dict[str, bool | None]]) -> dict[str, dict[str, float]]:
    """For each key of `check`'s results the share `right`, its standard error `se`, and how many were asked, `of`."""
    values: dict[str, list[bool]] = {}
    for result in results:
        for name, value in result.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    shares = {name: (sum(column) / len(column), len(column)) for name, column in values.items()}
    return {name: {"right": right, "se": share_error(right, of), "of": of} for name, (right, of) in shares.items()}


def share_error(share: float, of: int) -> float:
    """Binomial standard error of a share; 0 where all or none are right, which says nothing of how sure that is."""
    return math.sqrt(share * (1 - share) / of)


def _relation_holds(reading: SceneReading, meaning: dict[str, Any]) -> bool:
    first, second = (
        [found for found in reading.objects if found.colour == item["colour"]] for item in meaning["objects"]
    )
    axis = "x" if meaning["arrangement"] == "left" else "y"
    return any(getattr(a, axis) + MINIMUM_OFFSET < getattr(b, axis) for a in first for b in second)


# Pixels by which one shape must be left of, or above, another.
MINIMUM_OFFSET = 8


def _read_object(pixels: npt.NDArray[np.float64], distance: npt.NDArray[np.float64], mask: Mask) -> FoundObject:
    # How much of each pixel the shape covers: its colour's distance from the ground, relative to the shape's own.
    peak = np.percentile(distance[mask], 90)
    near = ndimage.binary_dilation(mask, iterations=2)
    colour = _nearest(np.median(pixels[near & (distance > 0.9 * peak)], axis=0), COLOURS)
    cover = np.where(near, np.minimum(distance / peak, 1.0), 0.0)
    rows, columns = np.nonzero(cover > 0.5)
    y, x = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
    window = _window(cover, round(x), round(y))
    names, templates, norms = _templates()
    kind, size = names[int((norms - 2 * templates @ window.ravel()).argmin())]  # least squares
    return FoundObject(colour, kind, size, float(x), float(y))


_HALF = 20  # half a window's width, in pixels


def _window(cover: Cover, x: int, y: int) -> Cover:
    padded = np.pad(cover, _HALF)
    return padded[y : y + 2 * _HALF, x : x + 2 * _HALF]


@cache
def _templates() -> tuple[list[tuple[str, str]], Cover, Cover]:
    """Kinds and sizes (n), coverage as rendered (n, window * window), squared norms (n), at every shift and blur."""
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

"""Procedural scenes: one to three colored shapes on a plain background, sampled from (seed, split, index).

Three families: a single shape; a pair of differently colored shapes, one left of or above the other; a group of two or
three equal shapes. Some color-kind pairs never occur in training and at least one of them occurs in every validation
scene, so validation measures composition, not recall.
"""

import random
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from math import cos, pi, sin
from typing import Any

from PIL import Image, ImageDraw

SIZE = 64
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (40, 155, 75),
    "blue": (40, 95, 215),
    "purple": (135, 60, 175),
    "pink": (245, 125, 175),
    "brown": (130, 80, 45),
}
BACKGROUNDS = {
    "white": (246, 246, 242),
    "grey": (168, 171, 176),
    "black": (24, 24, 28),
    "navy": (22, 34, 80),
    "beige": (233, 219, 186),
    "pale blue": (184, 214, 240),
    "pale green": (196, 230, 196),
    "lilac": (214, 200, 236),
}
KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
# Width in pixels.
SIZES = {"small": 16, "large": 26}
FAMILIES = {"single": 0.25, "pair": 0.5, "group": 0.25}
ARRANGEMENTS = ("left", "above")  # the first object of a pair is left of, or above, the second
COUNTS = (2, 3)

SPLITS = ("train", "val", "every_pair")
# One pair in eight: every kind and every color keeps most of its partners.
HELD_OUT = frozenset(zip(("red", "green", "blue", "yellow", "purple", "orange"), KINDS, strict=True))
ALL_PAIRS = tuple(product(COLOURS, KINDS))
TRAIN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT)

# Centers lie on a grid of this many pixels, a cell of the image tokenizer, so that a shape has one sequence of ids.
STEP = 8
# Coordinates that keep two large shapes apart and off the border.
NEAR, FAR = 16, 48
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class SceneObject:
    """A shape: color, kind and size by name; center in pixels from the top left."""

    colour: str
    kind: str
    size: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """Content of an image. `arrangement` is None except in pairs."""

    family: str
    background: str
    objects: tuple[SceneObject, ...]
    arrangement: str | None

    def meaning(self) -> dict[str, Any]:
        """The scene as JSON values."""
        return asdict(self)


def scene_from_meaning(meaning: dict[str, Any]) -> Scene:
    """Inverse of `Scene.meaning`."""
    objects = tuple(SceneObject(**item) for item in meaning["objects"])
    return Scene(meaning["family"], meaning["background"], objects, meaning["arrangement"])


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of an index, the same on every machine.

    The split `every_pair` trains the image tokenizer, which must be able to represent the held-out pairs.

    Raises:
        ValueError: if the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    rng = random.Random(f"scene/{seed}/{split}/{index}")
    coordinate = partial(rng.randrange, NEAR, FAR + 1, STEP)
    family = rng.choices(list(FAMILIES), list(FAMILIES.values()))[0]
    background = rng.choice(list(BACKGROUNDS))
    sizes = list(SIZES)
    if family == "single":
        colour, kind = _pairs(rng, split, 1)[0]
        x, y = coordinate(), coordinate()
        return Scene(family, background, (SceneObject(colour, kind, rng.choice(sizes), x, y),), None)
    if family == "pair":
        arrangement = rng.choice(ARRANGEMENTS)
        places = [(NEAR, coordinate()), (FAR, coordinate())]
        if arrangement == "above":
            places = [(y, x) for x, y in places]
        objects = tuple(
            SceneObject(colour, kind, rng.choice(sizes), x, y)
            for (colour, kind), (x, y) in zip(_pairs(rng, split, 2), places, strict=True)
        )
        return Scene(family, background, objects, arrangement)
    (colour, kind), size, count = _pairs(rng, split, 1)[0], rng.choice(sizes), rng.choice(COUNTS)
    if count == 2:
        y = coordinate()
        places = [(NEAR, y), (FAR, y)]
    else:
        places = [(NEAR, NEAR), (FAR, NEAR), (rng.randrange(24, 41, STEP), FAR)]
    return Scene(family, background, tuple(SceneObject(colour, kind, size, x, y) for x, y in places), None)


def _pairs(rng: random.Random, split: str, count: int) -> list[tuple[str, str]]:
    """Color-kind pairs of different colors: no held-out pair in training, at least one in validation."""
    first, later = {
        "train": (TRAIN_PAIRS, TRAIN_PAIRS),
        "val": (tuple(sorted(HELD_OUT)), ALL_PAIRS),
        "every_pair": (ALL_PAIRS, ALL_PAIRS),
    }[split]
    chosen: list[tuple[str, str]] = []
    for number in range(count):
        allowed = first if number == 0 else later
        taken = {colour for colour, _ in chosen}
        chosen.append(rng.choice([pair for pair in allowed if pair[0] not in taken]))
    if split == "val":
        rng.shuffle(chosen)
    return chosen


def outline(kind: str, x: float, y: float, width: float) -> list[tuple[float, float]]:
    """Polygon of a kind, centered at (x, y); circles and rings are drawn as ellipses instead."""
    r = width / 2
    if kind == "square":
        r *= 0.92
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if kind == "triangle":
        return [(x, y - r), (x + r, y + r * 0.9), (x - r, y + r * 0.9)]
    if kind == "star":
        r *= 1.15
        spokes = [(r if i % 2 == 0 else 0.42 * r, -pi / 2 + i * pi / 5) for i in range(10)]
        return [(x + d * cos(a), y + d * sin(a)) for d, a in spokes]
    if kind == "cross":
        a = r * 0.34
        corners = [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a), (-r, -a)]
        return [(x + dx, y + dy) for dx, dy in [*corners, (-a, -a)]]
    raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")


def render(scene: Scene, size: int = SIZE) -> Image.Image:
    """The scene as an anti-aliased RGB image of `size` x `size` pixels."""
    zoom = size * _SUPERSAMPLE / SIZE
    image = Image.new("RGB", (size * _SUPERSAMPLE,) * 2, BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        fill, x, y, width = COLOURS[item.colour], item.x * zoom, item.y * zoom, SIZES[item.size] * zoom
        if item.kind in ("circle", "ring"):
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=fill)
            if item.kind == "ring":
                hole = width * 0.27
                draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=BACKGROUNDS[scene.background])
        else:
            draw.polygon(outline(item.kind, x, y, width), fill=fill)
    return image.resize((size, size), Image.Resampling.BOX)

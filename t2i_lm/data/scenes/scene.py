"""Procedural scenes, one to three colored shapes on a background with or without a floor, and their rendering.

Three families: a single shape; a pair of differently colored shapes, one left of or above the other; a group of two or
three equal shapes. Equal pictures are equal scenes: no picture has two descriptions.
"""

from dataclasses import asdict, dataclass
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
ARRANGEMENTS = ("left", "above")  # the first object of a pair is left of, or above, the second
# First row of a floor, at the edge of a cell of the image tokenizer: every cell has one ground color.
HORIZONS = (24, 32, 40, 48)

# One pair in eight: every kind and every color keeps most of its partners.
HELD_OUT = frozenset(zip(("red", "green", "blue", "yellow", "purple", "orange"), KINDS, strict=True))
ALL_PAIRS = tuple(product(COLOURS, KINDS))
TRAIN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT)

# Coordinates of centers: on the grid of the image tokenizer's cells, so that a shape has one sequence of ids, and off
# the border. Shapes at the first and the last of them are apart, however large.
PLACES = (16, 24, 32, 40, 48)
NEAR, FAR = PLACES[0], PLACES[-1]
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
    """Content of an image.

    Attributes:
        family: `single`, `pair` or `group`.
        background: name of the color behind the shapes.
        objects: the shapes; of a pair, the first is left of or above the second.
        arrangement: of a pair, `left` or `above`; else None.
        floor: name of the ground's color from row `horizon` down, another than the background; None without a floor.
        horizon: in pixels from the top, one of `HORIZONS`; None without a floor.
    """

    family: str
    background: str
    objects: tuple[SceneObject, ...]
    arrangement: str | None
    floor: str | None = None
    horizon: int | None = None

    def meaning(self) -> dict[str, Any]:
        """The scene as JSON values."""
        return asdict(self)


def scene_from_meaning(meaning: dict[str, Any]) -> Scene:
    """Inverse of `Scene.meaning`.

    Raises:
        ValueError: on a scene of the first version of the data, whose captions followed another grammar.
    """
    if "floor" not in meaning:
        raise ValueError("scenes of an earlier version: this version cannot measure what their captions say")
    return Scene(**(meaning | {"objects": tuple(SceneObject(**item) for item in meaning["objects"])}))


def scene_of(meaning: dict[str, Any]) -> Scene:
    """The scene of a row's meaning, which also holds the style of its caption.

    Raises:
        ValueError: on a scene of the first version of the data.
    """
    return scene_from_meaning({key: value for key, value in meaning.items() if key != "style"})


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
    zoom, side = size * _SUPERSAMPLE / SIZE, size * _SUPERSAMPLE
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    if scene.floor is not None and scene.horizon is not None:
        image.paste(BACKGROUNDS[scene.floor], (0, round(scene.horizon * zoom), side, side))
    for item in scene.objects:
        mask = Image.new("1", image.size)
        draw = ImageDraw.Draw(mask)
        x, y, width = item.x * zoom, item.y * zoom, SIZES[item.size] * zoom
        if item.kind in ("circle", "ring"):
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=1)
            if item.kind == "ring":
                hole = width * 0.27
                draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        else:
            draw.polygon(outline(item.kind, x, y, width), fill=1)
        image.paste(COLOURS[item.colour], mask=mask)
    return image.resize((size, size), Image.Resampling.BOX)

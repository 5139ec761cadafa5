"""The space of all scenes, and its splits: every scene is enumerated once, so no picture recurs within a run.

A split is cut into blocks of 100 scenes with a fixed number of each stratum (family, number of shapes, floor or none).
A stratum's scenes are numbered by mixed radix; a seeded permutation puts them in order. Training takes them from the
front, `iid` from the back: the same distribution, disjoint, and the same `iid` scenes for every size of training.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod

from t2i_lm.data.permutation import Permutation
from t2i_lm.data.scenes.scene import (
    ALL_PAIRS,
    ARRANGEMENTS,
    BACKGROUNDS,
    FAR,
    HELD_OUT,
    HORIZONS,
    NEAR,
    PLACES,
    SIZES,
    TRAIN_PAIRS,
    Scene,
    SceneObject,
)

BLOCK = 100
# Blocks kept for the split at the back of a space.
RESERVED_BLOCKS = 1000

Point = tuple[int, int]
ColourKind = tuple[str, str]


@dataclass(frozen=True)
class Stratum:
    """Scenes of one family and number of shapes, all with or all without a floor; `share` of every block's 100."""

    family: str
    count: int
    floor: bool
    share: int


STRATA = (
    Stratum("single", 1, False, 1),
    Stratum("single", 1, True, 19),
    Stratum("pair", 2, False, 20),
    Stratum("pair", 2, True, 40),
    Stratum("group", 2, False, 2),
    Stratum("group", 2, True, 8),
    Stratum("group", 3, False, 1),
    Stratum("group", 3, True, 9),
)
# Number of stratum, and number within the block's scenes of that stratum.
_BLOCK = [(number, place) for number, stratum in enumerate(STRATA) for place in range(stratum.share)]
assert len(_BLOCK) == BLOCK


@dataclass(frozen=True)
class Split:
    """A split takes the scenes of a space (`spaces`) from the front or, in reverse, from the back."""

    space: str
    validation: bool = False
    back: bool = False


SPLITS = {
    "train": Split("trained"),
    "iid": Split("trained", validation=True, back=True),
    "compositional": Split("held_out", validation=True),
    "every_pair": Split("every_pair"),
    "every_pair_val": Split("every_pair", validation=True, back=True),
}
# Spaces that two splits share.
_SHARED = {split.space for split in SPLITS.values() if split.back}


@cache
def contents(space: str, family: str) -> tuple[tuple[ColourKind, ...], ...]:
    """Colors and kinds that a scene may have: one pair of both, or two pairs of different colors in order.

    `trained` has no held-out pair, `held_out` at least one in every scene.
    """
    allowed = TRAIN_PAIRS if space == "trained" else ALL_PAIRS
    chosen: list[tuple[ColourKind, ...]] = [(pair,) for pair in allowed]
    if family == "pair":
        chosen = [(first, second) for first, second in product(allowed, repeat=2) if first[0] != second[0]]
    return tuple(pairs for pairs in chosen if space != "held_out" or HELD_OUT & set(pairs))


@cache
def placements(family: str, count: int) -> tuple[tuple[str | None, tuple[Point, ...]], ...]:
    """Arrangements with the centers of all shapes; no two of them give equal pictures."""
    apart = FAR - NEAR
    sides = [((NEAR, a), (FAR, b)) for a, b in product(PLACES, repeat=2) if abs(a - b) < apart]
    columns = [((a, NEAR), (b, FAR)) for (_, a), (_, b) in sides]
    if family == "single":
        return tuple((None, ((x, y),)) for x, y in product(PLACES, repeat=2))
    if family == "pair":
        # Without diagonals: two shapes there are beside and above each other.
        left, above = ARRANGEMENTS
        return (*((left, places) for places in sides), *((above, places) for places in columns))
    if count == 2:
        diagonals = [((NEAR, NEAR), (FAR, FAR)), ((NEAR, FAR), (FAR, NEAR))]
        return tuple((None, places) for places in (*sides, *columns, *diagonals))
    triples: set[frozenset[Point]] = set()
    for side, other in ((NEAR, FAR), (FAR, NEAR)):
        for place in PLACES:
            triples.add(frozenset({(NEAR, side), (FAR, side), (place, other)}))
            triples.add(frozenset({(side, NEAR), (side, FAR), (other, place)}))
    return tuple((None, places) for places in sorted(tuple(sorted(triple)) for triple in triples))


@dataclass(frozen=True)
class _Enumeration:
    """The scenes of a stratum in a space, by number."""

    stratum: Stratum
    contents: tuple[tuple[ColourKind, ...], ...]

    @property
    def choices(self) -> tuple[int, ...]:
        """Number of alternatives of each choice, the fastest first."""
        stratum = self.stratum
        places = len(placements(stratum.family, stratum.count))
        sizes = len(SIZES) ** len(self.contents[0])
        floor = ((len(BACKGROUNDS) - 1), len(HORIZONS)) if stratum.floor else ()
        return (len(self.contents), sizes, places, len(BACKGROUNDS), *floor)

    @property
    def size(self) -> int:
        return prod(self.choices)

    def __getitem__(self, number: int) -> Scene:
        digits = []
        for radix in self.choices:
            number, digit = divmod(number, radix)
            digits.append(digit)
        pairs, chosen_sizes, place, ground, *floor = digits
        family = self.stratum.family
        arrangement, points = placements(family, self.stratum.count)[place]
        described = list(self.contents[pairs])
        sizes = [list(SIZES)[chosen_sizes >> bit & 1] for bit in range(len(described))]
        if family == "group":
            described, sizes = described * len(points), sizes * len(points)
        objects = tuple(
            SceneObject(colour, kind, size, x, y)
            for (colour, kind), size, (x, y) in zip(described, sizes, points, strict=True)
        )
        background = list(BACKGROUNDS)[ground]
        if not floor:
            return Scene(family, background, objects, arrangement)
        others = [name for name in BACKGROUNDS if name != background]
        return Scene(family, background, objects, arrangement, others[floor[0]], HORIZONS[floor[1]])


@cache
def enumerations(space: str) -> tuple[_Enumeration, ...]:
    """The scenes of each stratum of a space, in the order of `STRATA`."""
    return tuple(_Enumeration(stratum, contents(space, stratum.family)) for stratum in STRATA)


@cache
def scene_nats(space: str = "trained") -> float:
    """Entropy of a picture without its caption in nats, exactly: within a stratum all are equally likely."""
    shares = [scenes.stratum.share / BLOCK for scenes in enumerations(space)]
    return sum(share * math.log(scenes.size / share) for share, scenes in zip(shares, enumerations(space), strict=True))


def largest(split: str) -> int:
    """Number of scenes in a split, none of which recurs in it or in another split of training or validation.

    Raises:
        ValueError: if the split is unknown.
    """
    chosen = _split(split)
    if chosen.back:
        return RESERVED_BLOCKS * BLOCK
    reserved = RESERVED_BLOCKS if chosen.space in _SHARED else 0
    return BLOCK * min(scenes.size // scenes.stratum.share - reserved for scenes in enumerations(chosen.space))


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of an index, the same on every machine.

    `train` and `iid` have no held-out pair, `compositional` has one in every scene. `every_pair` trains the image
    tokenizer, which must be able to represent all, and `every_pair_val` validates it.

    Raises:
        ValueError: if the split is unknown, or the index not below its `largest` size.
    """
    chosen = _split(split)
    if not 0 <= index < largest(split):
        raise ValueError(f"index={index}: the split {split} has {largest(split):,} scenes")
    block, place = divmod(index, BLOCK)
    number, within = _BLOCK[Permutation(BLOCK, ("order", seed, split, block))[place]]
    scenes = enumerations(chosen.space)[number]
    rank = block * scenes.stratum.share + within
    return scenes[_order(seed, chosen.space, number)[scenes.size - 1 - rank if chosen.back else rank]]


@cache
def _order(seed: int, space: str, number: int) -> Permutation:
    return Permutation(enumerations(space)[number].size, ("scenes", seed, space, number))


def _split(name: str) -> Split:
    if name not in SPLITS:
        raise ValueError(f"split={name!r}: expected one of {', '.join(SPLITS)}")
    return SPLITS[name]

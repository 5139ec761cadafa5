"""English captions of scenes, and their entropy, the lower bound of the text loss.

Captions are sampled from a small unambiguous grammar: every string has one derivation, so its probability is the
product of the choices it reveals. A full stop occurs only at the end, so the end is a text token and the lower bound of
the text loss is the entropy of a caption per text token.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache

from t2i_lm.data.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    FAMILIES,
    HELD_OUT,
    KINDS,
    SIZES,
    TRAIN_PAIRS,
    Scene,
    SceneObject,
    draw_scene,
)

COLOUR_WORDS = {name: (name,) for name in COLOURS} | {"purple": ("purple", "violet"), "pink": ("pink", "rose")}
KIND_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "great")}
COUNT_WORDS = {2: ("two", "2", "a pair of"), 3: ("three", "3", "a group of three")}
BACKGROUND_WORDS = {name: (name,) for name in BACKGROUNDS} | {
    "navy": ("dark blue", "navy"),
    "beige": ("beige", "sandy"),
    "lilac": ("lilac", "lavender"),
}
GROUNDS = ("on a {} background", "against a {} backdrop", "upon a {} ground", "on {} paper")
FORWARD = {
    "left": ("to the left of", "on the left side of", "left of"),
    "above": ("above", "over", "higher than"),
}
BACKWARD = {
    "left": ("to the right of", "on the right side of", "right of"),
    "above": ("below", "under", "beneath"),
}
VERBS = ("is", "sits", "stands", "lies", "rests", "appears", "is placed")
NOUN_OPENINGS = (
    "",
    "a picture of ",
    "a drawing of ",
    "here we see ",
    "the picture shows ",
    "the artist has drawn ",
    "we behold ",
)
CLOSINGS = (
    " and nothing else",
    ", drawn by hand",
    ", as plain as can be",
    ", for the eye to see",
    ", in a simple manner",
    " and nothing more is to be seen",
)
SIZE_SHARE, GROUND_SHARE, CLOSING_SHARE = 0.6, 0.9, 0.2
ATTRIBUTES = ("background", "colour", "kind", "size", "relation", "count")


@dataclass(frozen=True)
class Description:
    """A caption, its ln p under the training distribution in nats, and the attributes that it mentions."""

    text: str
    log_prob: float
    mentioned: frozenset[str]


class _Chooser:
    """Random choices, with the log-probability of everything that the caption reveals."""

    def __init__(self, style: str) -> None:
        self.rng = random.Random(f"caption/{style}")
        self.log_prob = 0.0

    def one_of(self, options: Sequence[str]) -> str:
        # One uniform number per choice, so that the length of a word list does not change later choices.
        position = int(self.rng.random() * len(options))
        self.log_prob -= math.log(len(options))
        return options[position]

    def chance(self, share: float) -> bool:
        happens = self.rng.random() < share
        self.log_prob += math.log(share if happens else 1 - share)
        return happens

    def shown(self, probability: float) -> None:
        """Adds the log-probability of a scene attribute that the caption reveals."""
        self.log_prob += math.log(probability)


def describe(scene: Scene, style: str, opposite: bool = False) -> Description:
    """The caption of a scene in a style.

    The style determines every wording: captions of two scenes of one family in one style differ only in mentioned
    attributes that differ. The log-probability is marginal over positions and unmentioned attributes, which are
    independent of the rest in the training distribution.

    Args:
        scene: the scene.
        style: seed of every wording.
        opposite: state the opposite of the scene's arrangement, all else equal.
    """
    chooser = _Chooser(style)
    chooser.shown(FAMILIES[scene.family])
    mentioned = {"colour", "kind"}
    with_size = [chooser.chance(SIZE_SHARE) for _ in range(2 if scene.family == "pair" else 1)]
    if any(with_size):
        mentioned.add("size")
    if scene.family == "pair":
        mentioned.add("relation")
        body = _pair_clause(scene, chooser, with_size, opposite)
    else:
        first = scene.objects[0]
        chooser.shown(1 / len(TRAIN_PAIRS))
        if scene.family == "group":
            mentioned.add("count")
            chooser.shown(1 / len(COUNTS))
            phrase = f"{chooser.one_of(COUNT_WORDS[len(scene.objects)])} {_noun(first, chooser, with_size[0], True)}"
        else:
            phrase = _article(_noun(first, chooser, with_size[0], False))
        body = f"{chooser.one_of(NOUN_OPENINGS)}{phrase}"
    if chooser.chance(GROUND_SHARE):
        mentioned.add("background")
        chooser.shown(1 / len(BACKGROUNDS))
        ground = chooser.one_of(GROUNDS).format(chooser.one_of(BACKGROUND_WORDS[scene.background]))
        body = f"{ground}, {body}" if chooser.chance(0.35) else f"{body} {ground}"
    if chooser.chance(CLOSING_SHARE):
        body += chooser.one_of(CLOSINGS)
    text = f"{body[0].upper()}{body[1:]}."
    return Description(text, chooser.log_prob, frozenset(mentioned))


def _pair_clause(scene: Scene, chooser: _Chooser, with_size: list[bool], opposite: bool) -> str:
    first, second = scene.objects
    assert scene.arrangement is not None
    others = sum(colour != first.colour for colour, _ in TRAIN_PAIRS)
    chooser.shown(1 / len(TRAIN_PAIRS) / others / len(FORWARD))
    forward = chooser.chance(0.5)
    relation = chooser.one_of((FORWARD if forward != opposite else BACKWARD)[scene.arrangement])
    items = [first, second] if forward else [second, first]
    subject, landmark = (
        _article(_noun(item, chooser, size, False)) for item, size in zip(items, with_size, strict=True)
    )
    form = chooser.one_of(("noun", "clause", "inverted"))
    if form == "noun":
        return f"{chooser.one_of(NOUN_OPENINGS)}{subject} {relation} {landmark}"
    verb = chooser.one_of(VERBS)
    if form == "clause":
        return f"{subject} {verb} {relation} {landmark}"
    return f"{relation} {landmark} {verb} {subject}"


def _noun(item: SceneObject, chooser: _Chooser, with_size: bool, plural: bool) -> str:
    words = [chooser.one_of(SIZE_WORDS[item.size])] if with_size else []
    if with_size:
        chooser.shown(1 / len(SIZES))
    words.append(chooser.one_of(COLOUR_WORDS[item.colour]))
    kind = chooser.one_of(KIND_WORDS[item.kind])
    return " ".join([*words, f"{kind}es" if plural and kind == "cross" else f"{kind}s" if plural else kind])


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def altered(scene: Scene, style: str, attribute: str, seed: str) -> tuple[str, str] | None:
    """A scene's caption, and the caption with one attribute altered; None if it does not mention the attribute.

    Raises:
        ValueError: on an unknown attribute.
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(f"attribute={attribute!r}: expected one of {', '.join(ATTRIBUTES)}")
    caption = describe(scene, style)
    if attribute not in caption.mentioned:
        return None
    if attribute == "relation":
        return caption.text, describe(scene, style, opposite=True).text
    rng = random.Random(f"altered/{seed}/{style}/{attribute}")
    # The size of an object may be unmentioned, so objects are tried until the caption changes.
    for place in rng.sample(range(len(scene.objects)), len(scene.objects)):
        other = describe(_alter(scene, attribute, place, rng), style).text
        if other != caption.text:
            return caption.text, other
    return None


def _alter(scene: Scene, attribute: str, place: int, rng: random.Random) -> Scene:
    """The scene with another value of one attribute, of the object at `place` or of a whole group."""

    def pick(options: Sequence[str], *taken: str) -> str:
        return rng.choice([option for option in options if option not in taken])

    if attribute == "background":
        return replace(scene, background=pick(list(BACKGROUNDS), scene.background))
    if attribute == "count":
        count = 2 if len(scene.objects) == 3 else 3
        return replace(scene, objects=(scene.objects[0],) * count)
    item = scene.objects[place]
    taken = [other.colour for other in scene.objects] if attribute == "colour" else [getattr(item, attribute)]
    options = {"colour": list(COLOURS), "kind": KINDS, "size": list(SIZES)}[attribute]
    value = pick(options, *taken)
    altered_places = range(len(scene.objects)) if scene.family == "group" else (place,)
    objects = [
        SceneObject(**(asdict(other) | {attribute: value})) if number in altered_places else other
        for number, other in enumerate(scene.objects)
    ]
    return replace(scene, objects=tuple(objects))


@cache
def entropy(samples: int, seed: int) -> tuple[float, float]:
    """Monte Carlo estimate of a training caption's entropy in nats, and its standard error."""
    values = [-describe(draw_scene(seed, "train", index), f"{seed}/train/{index}").log_prob for index in range(samples)]
    mean = sum(values) / samples
    variance = sum((value - mean) ** 2 for value in values) / max(1, samples - 1)
    return mean, math.sqrt(variance / samples)


assert not HELD_OUT & set(TRAIN_PAIRS)

"""English captions of scenes, and the entropy that bounds their loss from below.

A caption is drawn by a small unambiguous grammar: every string has one derivation, so its probability under
the generator is the product of the choices it shows. Only the end of a caption is a full stop, so the end is
signalled by a text token and the floor of the text loss is the entropy of the caption over its text tokens.
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
    """A caption with ln p(caption) in nats over the training distribution, and the attributes it mentions."""

    text: str
    log_prob: float
    mentioned: frozenset[str]


class _Chooser:
    """Draws choices and adds up the log-probability of all that the caption shows."""

    def __init__(self, style: str) -> None:
        self.rng = random.Random(f"caption/{style}")
        self.log_prob = 0.0

    def one_of(self, options: Sequence[str]) -> str:
        # One uniform number a choice, so that another word list does not shift the later choices.
        position = int(self.rng.random() * len(options))
        self.log_prob -= math.log(len(options))
        return options[position]

    def chance(self, share: float) -> bool:
        happens = self.rng.random() < share
        self.log_prob += math.log(share if happens else 1 - share)
        return happens

    def shown(self, probability: float) -> None:
        """A scene attribute that the caption reveals."""
        self.log_prob += math.log(probability)


def describe(scene: Scene, style: str, opposite: bool = False) -> Description:
    """The caption of a scene in a style.

    The style decides every wording; two scenes of one family described in one style differ only where their
    mentioned attributes do. The log-probability is marginal over what the caption leaves out: positions and
    unmentioned attributes, which are independent of the rest in the training distribution.

    Args:
        scene: what the image shows.
        style: seed of every wording.
        opposite: states the opposite of the scene's arrangement, all else equal.
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
    """The caption of a scene and the same caption with one attribute altered; None if it is not mentioned.

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
    # Unmentioned sizes change nothing, so every object is tried until the caption changes.
    for victim in rng.sample(range(len(scene.objects)), len(scene.objects)):
        other = describe(_alter(scene, attribute, victim, rng), style).text
        if other != caption.text:
            return caption.text, other
    return None


def _alter(scene: Scene, attribute: str, victim: int, rng: random.Random) -> Scene:
    def pick(options: Sequence[str], *taken: str) -> str:
        return rng.choice([option for option in options if option not in taken])

    if attribute == "background":
        return replace(scene, background=pick(list(BACKGROUNDS), scene.background))
    if attribute == "count":
        count = 2 if len(scene.objects) == 3 else 3
        return replace(scene, objects=(scene.objects[0],) * count)
    item = scene.objects[victim]
    taken = [other.colour for other in scene.objects] if attribute == "colour" else [getattr(item, attribute)]
    options = {"colour": list(COLOURS), "kind": KINDS, "size": list(SIZES)}[attribute]
    value = pick(options, *taken)
    chosen = range(len(scene.objects)) if scene.family == "group" else (victim,)
    return replace(
        scene,
        objects=tuple(
            SceneObject(**{**asdict(other), attribute: value}) if place in chosen else other
            for place, other in enumerate(scene.objects)
        ),
    )


@cache
def entropy(samples: int, seed: int) -> tuple[float, float]:
    """Entropy of a training caption in nats and its standard error, by Monte Carlo over `samples` captions."""
    values = [-describe(draw_scene(seed, "train", index), f"{seed}/train/{index}").log_prob for index in range(samples)]
    mean = sum(values) / samples
    variance = sum((value - mean) ** 2 for value in values) / max(1, samples - 1)
    return mean, math.sqrt(variance / samples)


assert not HELD_OUT & set(TRAIN_PAIRS)

"""English captions of scenes, with their exact entropy and that of a picture given its caption.

Captions are sampled from a small unambiguous grammar: every string has one derivation, so its probability is the
product of the choices it reveals. A full stop occurs only at the end, so the end is a text token and the lower bound of
the text loss is the entropy of a caption per text token. A caption names the floor wherever there is one, so that a
caption without a floor means none; it never says where the floor begins.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache

from t2i_lm.data.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    HORIZONS,
    KINDS,
    SIZES,
    Scene,
    SceneObject,
)
from t2i_lm.data.scenes.space import BLOCK, STRATA, Stratum, contents, placements

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
FLOORS = ("with a {} floor", "over a {} floor", "above a {} floor", "with a floor painted {}")
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
NOUN_FORM, CLAUSE, INVERTED = "noun", "clause", "inverted"
FORMS = (NOUN_FORM, CLAUSE, INVERTED)
SIZE_SHARE, GROUND_SHARE, FRONT_SHARE, CLOSING_SHARE = 0.6, 0.9, 0.35, 0.2
ATTRIBUTES = ("background", "floor", "colour", "kind", "size", "relation", "count")


@dataclass(frozen=True)
class Description:
    """A caption.

    Attributes:
        text: the caption.
        log_prob: its ln p under the training distribution, in nats.
        mentioned: the attributes that it mentions.
        image_nats: ln of the number of pictures that it describes, all equally likely.
    """

    text: str
    log_prob: float
    mentioned: frozenset[str]
    image_nats: float


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
    stratum = _stratum(scene)
    chooser.shown(stratum.share / BLOCK)
    chooser.shown(1 / len(contents("trained", scene.family)))
    mentioned = {"colour", "kind"}
    with_size = [chooser.chance(SIZE_SHARE) for _ in range(2 if scene.family == "pair" else 1)]
    if any(with_size):
        mentioned.add("size")
    if scene.family == "pair":
        mentioned.add("relation")
        body = _pair_clause(scene, chooser, with_size, opposite)
    else:
        first = scene.objects[0]
        if scene.family == "group":
            mentioned.add("count")
            phrase = f"{chooser.one_of(COUNT_WORDS[len(scene.objects)])} {_noun(first, chooser, with_size[0], True)}"
        else:
            phrase = _article(_noun(first, chooser, with_size[0], False))
        body = f"{chooser.one_of(NOUN_OPENINGS)}{phrase}"
    setting = []
    if chooser.chance(GROUND_SHARE):
        mentioned.add("background")
        chooser.shown(1 / len(BACKGROUNDS))
        setting.append(chooser.one_of(GROUNDS).format(chooser.one_of(BACKGROUND_WORDS[scene.background])))
    if scene.floor is not None:
        mentioned.add("floor")
        # One of the colors that the background has not, as far as the caption says.
        chooser.shown(1 / (len(BACKGROUNDS) - len(setting)))
        setting.append(chooser.one_of(FLOORS).format(chooser.one_of(BACKGROUND_WORDS[scene.floor])))
    if setting:
        words = " ".join(setting)
        body = f"{words}, {body}" if chooser.chance(FRONT_SHARE) else f"{body} {words}"
    if chooser.chance(CLOSING_SHARE):
        body += chooser.one_of(CLOSINGS)
    text = f"{body[0].upper()}{body[1:]}."
    nats = _image_nats(stratum, with_size.count(False), "background" in mentioned)
    return Description(text, chooser.log_prob, frozenset(mentioned), nats)


def _stratum(scene: Scene) -> Stratum:
    described = (scene.family, len(scene.objects), scene.floor is not None)
    return next(stratum for stratum in STRATA if (stratum.family, stratum.count, stratum.floor) == described)


def _image_nats(stratum: Stratum, sizes: int, background: bool) -> float:
    """Ln of the number of pictures of a caption that leaves `sizes` sizes open, and the background unless it names it.

    A pair's caption states its arrangement, one of two with equally many placements; no caption states a horizon.
    """
    places = len(placements(stratum.family, stratum.count)) // (2 if stratum.family == "pair" else 1)
    # A floor, always named, has another color than the background.
    grounds = 1 if background else len(BACKGROUNDS) - stratum.floor
    horizons = len(HORIZONS) if stratum.floor else 1
    return math.log(places * len(SIZES) ** sizes * grounds * horizons)


def _pair_clause(scene: Scene, chooser: _Chooser, with_size: list[bool], opposite: bool) -> str:
    first, second = scene.objects
    assert scene.arrangement is not None
    chooser.shown(1 / len(FORWARD))
    forward = chooser.chance(0.5)
    relation = chooser.one_of((FORWARD if forward != opposite else BACKWARD)[scene.arrangement])
    items = [first, second] if forward else [second, first]
    subject, landmark = (
        _article(_noun(item, chooser, size, False)) for item, size in zip(items, with_size, strict=True)
    )
    form = chooser.one_of(FORMS)
    if form == NOUN_FORM:
        return f"{chooser.one_of(NOUN_OPENINGS)}{subject} {relation} {landmark}"
    verb = chooser.one_of(VERBS)
    if form == CLAUSE:
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


def altered(scene: Scene, style: str, attribute: str, seed: str) -> str | None:
    """A scene's caption with one attribute altered; None if it does not mention the attribute.

    Raises:
        ValueError: on an unknown attribute.
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(f"attribute={attribute!r}: expected one of {', '.join(ATTRIBUTES)}")
    caption = describe(scene, style)
    if attribute not in caption.mentioned:
        return None
    if attribute == "relation":
        return describe(scene, style, opposite=True).text
    rng = random.Random(f"altered/{seed}/{style}/{attribute}")
    # The size of an object may be unmentioned, so objects are tried until the caption changes.
    for place in rng.sample(range(len(scene.objects)), len(scene.objects)):
        other = describe(_alter(scene, attribute, place, rng), style).text
        if other != caption.text:
            return other
    return None


def _alter(scene: Scene, attribute: str, place: int, rng: random.Random) -> Scene:
    """The scene with another value of one attribute, of the object at `place` or of a whole group."""

    def pick(options: Sequence[str], *taken: str) -> str:
        return rng.choice([option for option in options if option not in taken])

    if attribute in ("background", "floor"):
        grounds = [name for name in (scene.background, scene.floor) if name is not None]
        ground = pick(list(BACKGROUNDS), *grounds)
        return replace(scene, background=ground) if attribute == "background" else replace(scene, floor=ground)
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
def caption_nats(space: str = "trained") -> float:
    """Entropy of a training caption in nats: the expectation of `-Description.log_prob`, exactly.

    The lower bound of the summed text loss of a new training scene (`train`, `iid`).

    Args:
        space: of the training scenes; `every_pair` with `data.hold_out_pairs=false`.
    """
    return sum(stratum.share / BLOCK * _caption_nats(stratum, space) for stratum in STRATA)


def _caption_nats(stratum: Stratum, space: str) -> float:
    """The expectation over a stratum's scenes and captions."""
    described = contents(space, stratum.family)
    nats = -math.log(stratum.share / BLOCK) + math.log(len(described))
    # Words of each named shape; both are synonyms drawn uniformly.
    nouns = [
        math.log(len(COLOUR_WORDS[colour]) * len(KIND_WORDS[kind])) for pairs in described for colour, kind in pairs
    ]
    size = _binary(SIZE_SHARE) + SIZE_SHARE * (math.log(len(SIZES)) + _mean_log(SIZE_WORDS.values()))
    nats += sum(nouns) / len(described) + size * len(described[0])
    if stratum.family == "pair":
        # Arrangement, direction, relation (`FORWARD` and `BACKWARD` have equally many of each), form.
        nats += math.log(len(FORWARD)) + _binary(0.5) + _mean_log(FORWARD.values()) + math.log(len(FORMS))
        noun_share = 1 / len(FORMS)
        nats += noun_share * math.log(len(NOUN_OPENINGS)) + (1 - noun_share) * math.log(len(VERBS))
    else:
        nats += math.log(len(NOUN_OPENINGS))
    if stratum.family == "group":
        nats += math.log(len(COUNT_WORDS[stratum.count]))
    words = _mean_log(BACKGROUND_WORDS.values())
    nats += _binary(GROUND_SHARE) + GROUND_SHARE * (math.log(len(BACKGROUNDS)) + math.log(len(GROUNDS)) + words)
    setting_share = GROUND_SHARE
    if stratum.floor:
        nats += GROUND_SHARE * math.log(len(BACKGROUNDS) - 1) + (1 - GROUND_SHARE) * math.log(len(BACKGROUNDS))
        nats += math.log(len(FLOORS)) + words
        setting_share = 1.0
    nats += setting_share * _binary(FRONT_SHARE)
    return nats + _binary(CLOSING_SHARE) + CLOSING_SHARE * math.log(len(CLOSINGS))


@cache
def picture_nats() -> float:
    """Entropy of a picture given its caption in nats: the expectation of `Description.image_nats`, exactly.

    The lower bound of the summed image loss, provided that different pictures have different ids. The same in every
    split: what varies at random within a caption does not depend on colors and kinds.
    """
    total = 0.0
    for stratum in STRATA:
        described = 2 if stratum.family == "pair" else 1
        open_sizes = described * (1 - SIZE_SHARE) * math.log(len(SIZES))
        for background, share in ((True, GROUND_SHARE), (False, 1 - GROUND_SHARE)):
            total += stratum.share / BLOCK * share * (open_sizes + _image_nats(stratum, 0, background))
    return total


def _binary(share: float) -> float:
    """Entropy of a choice between two, in nats."""
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


def _mean_log(words: Iterable[Sequence[str]]) -> float:
    """Mean ln of the lengths of equally likely lists of words."""
    logs = [math.log(len(one)) for one in words]
    return sum(logs) / len(logs)

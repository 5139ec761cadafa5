import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from t2i_lm.data.scenes.captions import ATTRIBUTES, Description, altered, caption_nats, describe, picture_nats
from t2i_lm.data.scenes.checker import check, read_scene, shares_right
from t2i_lm.data.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    HORIZONS,
    KINDS,
    SIZES,
    Scene,
    SceneObject,
    render,
    scene_from_meaning,
)
from t2i_lm.data.scenes.source import SceneSource
from t2i_lm.data.scenes.space import BLOCK, STRATA, Stratum, draw_scene, enumerations

EVERYTHING = frozenset(ATTRIBUTES)


def checkable(scene: Scene) -> frozenset[str]:
    """Attributes that a caption of the scene can mention: only pairs have a relation."""
    return EVERYTHING if scene.family == "pair" else EVERYTHING - {"relation"}


def failed_checks(image: Scene, described: Scene, mentioned: frozenset[str] | None = None) -> set[str]:
    """Checks that an image of one scene fails when another scene was described."""
    results = check(np.asarray(render(image)), described.meaning(), mentioned or checkable(described))
    return {name for name, right in results.items() if right is False}


@pytest.mark.slow
def test_the_checker_is_exact_on_rendered_scenes() -> None:
    for index in range(200):
        scene = draw_scene(1, ("train", "iid", "compositional", "every_pair")[index % 4], index)
        assert check(np.asarray(render(scene)), scene.meaning(), checkable(scene))["exact"], scene


def test_the_checker_rejects_another_scene() -> None:
    right = wrong = 0
    for index in range(200):
        scene, other = draw_scene(0, "train", index), draw_scene(0, "train", index + 1000)
        result = check(np.asarray(render(other)), scene.meaning(), EVERYTHING - {"relation"})
        right += bool(result["all"])
        wrong += not result["all"]
    assert right <= 2
    assert wrong >= 198


def other(value: str, values: Iterable[str], *taken: str) -> str:
    """The first of `values` that differs from `value` and from all `taken`."""
    return next(one for one in values if one not in (value, *taken))


def with_shape(scene: Scene, place: int, **changes: Any) -> Scene:
    """The scene with one shape changed; in a group all shapes, since captions describe them together."""
    places = range(len(scene.objects)) if scene.family == "group" else (place,)
    objects = [replace(shape, **changes) if at in places else shape for at, shape in enumerate(scene.objects)]
    return replace(scene, objects=tuple(objects))


def alterations(scene: Scene) -> Iterator[tuple[str, Scene, set[str]]]:
    """Attribute, scene with only that altered, and the checks that then fail beside `all` and `exact`."""
    grounds = (scene.background, *([scene.floor] if scene.floor else []))
    ground = other(scene.background, BACKGROUNDS, *grounds)
    yield "background", replace(scene, background=ground), {"background"}
    yield "floor", replace(scene, floor=ground, horizon=scene.horizon or HORIZONS[0]), {"floor"}
    if scene.floor is not None:
        yield "floor", replace(scene, floor=None, horizon=None), {"floor"}
    for place, shape in enumerate(scene.objects):
        colour = other(shape.colour, COLOURS, *(one.colour for one in scene.objects))
        # Shapes are identified by color. In a pair, one of the two colors remains.
        dependent = {"kind", "size"} | ({"relation"} if scene.family == "pair" else {"any_colour"})
        yield "colour", with_shape(scene, place, colour=colour), {"colour"} | dependent
        # `size` requires a shape of the right kind.
        yield "kind", with_shape(scene, place, kind=other(shape.kind, KINDS)), {"kind", "size"}
        yield "size", with_shape(scene, place, size=other(shape.size, SIZES)), {"size"}
    if scene.family == "pair":
        first, second = scene.objects
        swapped = (replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y))
        turned = (replace(first, x=first.y, y=first.x), replace(second, x=second.y, y=second.x))
        yield "relation", replace(scene, objects=swapped), {"relation"}
        if min(abs(first.x - second.x), abs(first.y - second.y)) <= 8:  # otherwise both relations may hold
            yield "relation", replace(scene, objects=turned), {"relation"}
    if scene.family == "group":
        yield "count", replace(scene, objects=scene.objects[:-1]), {"count"}


@pytest.mark.slow
def test_one_altered_attribute_fails_its_own_check_and_the_dependent_ones() -> None:
    seen: Counter[str] = Counter()
    for index in range(24):
        scene = draw_scene(2, "compositional" if index % 2 else "train", index)
        for attribute, image, wrong in alterations(scene):
            seen[attribute] += 1
            assert failed_checks(image, scene) == wrong | {"all", "exact"}, (attribute, scene)
            if attribute not in ("colour", "kind", "floor"):  # every caption states these, or that there is no floor
                left = {"exact"} if attribute == "count" else set()
                assert failed_checks(image, scene, checkable(scene) - {attribute}) == left, (attribute, scene)
    assert set(seen) == set(ATTRIBUTES)
    assert min(seen.values()) > 2


def test_unmentioned_attributes_are_not_checked_and_an_unmentioned_floor_is_none() -> None:
    scene = next(scene for scene in (draw_scene(0, "train", index) for index in range(99)) if scene.floor is None)
    results = check(np.asarray(render(scene)), scene.meaning(), frozenset({"colour", "kind"}))
    assert {name for name, right in results.items() if right is None} == {"background", "size", "relation", "count"}
    assert results["all"]
    floored = replace(scene, floor=other(scene.background, BACKGROUNDS), horizon=40)
    assert failed_checks(floored, scene, frozenset({"colour", "kind"})) == {"floor", "all", "exact"}


def test_every_horizon_and_pair_of_grounds_is_read() -> None:
    shape = SceneObject("brown", "ring", "large", 32, 32)
    for horizon, (above, below) in product(HORIZONS, product(BACKGROUNDS, repeat=2)):
        if above != below:
            reading = read_scene(np.asarray(render(Scene("single", above, (shape,), None, below, horizon))))
            assert (reading.background, reading.floor, reading.horizon) == (above, below, horizon)
            assert [(one.colour, one.kind, one.size) for one in reading.objects] == [("brown", "ring", "large")]


@pytest.mark.slow
def test_an_additional_shape_fails_count_if_mentioned_and_exact_always() -> None:
    seen: Counter[str] = Counter()
    for index in range(50):
        scene = draw_scene(2, "compositional", index)
        free = [place for place in product((12, 52), repeat=2) if is_free(place, scene)]
        if not free:
            continue
        seen[scene.family] += 1
        colour = other("", COLOURS, *(shape.colour for shape in scene.objects))
        more = replace(scene, objects=(*scene.objects, SceneObject(colour, "circle", "small", *free[0])))
        assert failed_checks(more, scene, checkable(scene) - {"count"}) == {"exact"}, scene
        assert failed_checks(more, scene) == {"count", "all", "exact"}, scene
    assert set(seen) == {"single", "pair", "group"}


def is_free(place: tuple[int, int], scene: Scene) -> bool:
    """Whether a small shape at a place would touch no shape of the scene."""
    return all(max(abs(place[0] - shape.x), abs(place[1] - shape.y)) > 24 for shape in scene.objects)


def test_shares_have_binomial_standard_errors() -> None:
    results: list[dict[str, bool | None]] = [{"kind": number < 16, "count": None} for number in range(64)]
    results[0]["count"] = True
    assert shares_right(results) == {
        "kind": {"right": 0.25, "se": pytest.approx(math.sqrt(0.25 * 0.75 / 64)), "of": 64},
        "count": {"right": 1.0, "se": 0.0, "of": 1},
    }


def test_the_checker_tolerates_blur_and_noise() -> None:
    totals: Counter[str] = Counter()
    for index in range(100):
        scene = draw_scene(0, "compositional", index)
        pixels = np.asarray(render(scene).filter(ImageFilter.GaussianBlur(1.2)), dtype=np.float64)
        noisy = np.clip(pixels + np.random.default_rng(index).normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        result = check(noisy, scene.meaning(), EVERYTHING - {"relation"})
        totals.update({name: bool(value) for name, value in result.items()})
    assert totals["background"] >= 0.98 * 100
    assert totals["floor"] >= 0.98 * 100
    assert totals["colour"] >= 0.98 * 100
    assert totals["kind"] >= 0.99 * 100
    assert totals["size"] >= 0.99 * 100


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 64))
def test_the_checker_accepts_any_image(seed: int, blocks: int) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (blocks, blocks, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.NEAREST))
    check(image, draw_scene(0, "train", seed % 1000).meaning(), EVERYTHING - {"relation"})


def test_another_image_size_is_rejected() -> None:
    with pytest.raises(ValueError, match="64"):
        read_scene(np.zeros((32, 32, 3), dtype=np.uint8))


def test_a_scene_source_yields_caption_and_meaning() -> None:
    pair = SceneSource(10, "compositional", 0)[3]
    meaning = dict(pair.meaning or {})
    style = meaning.pop("style")
    scene = scene_from_meaning(meaning)
    assert scene == draw_scene(0, "compositional", 3)
    assert pair.captions == [describe(scene, style).text]
    assert pair.image.size == (64, 64)


def test_the_only_full_stop_of_a_caption_is_its_end() -> None:
    for index in range(500):
        text = describe(draw_scene(0, "train", index), str(index)).text
        assert text.index(".") == len(text) - 1
        assert text[0].isupper() or text[0].isdigit()


def test_a_caption_names_every_floor_and_no_other() -> None:
    for index in range(500):
        scene = draw_scene(0, "train", index)
        caption = describe(scene, str(index))
        assert ("floor" in caption.text) == ("floor" in caption.mentioned) == (scene.floor is not None)


def test_captions_have_one_derivation_and_floors_are_the_means_of_their_terms() -> None:
    """Equal captions have equal probability and content; both entropies are exact expectations (4 standard errors)."""
    seen: dict[str, tuple[float, str, frozenset[str], float]] = {}
    terms = []
    for index in range(20_000):
        scene = draw_scene(0, "train", index)
        caption = describe(scene, str(index))
        shown = [[item.colour, item.kind] for item in scene.objects]
        entry = (
            round(caption.log_prob, 9),
            f"{shown}{scene.arrangement}{scene.floor}",
            caption.mentioned,
            round(caption.image_nats, 9),
        )
        assert seen.setdefault(caption.text, entry) == entry, caption.text
        terms.append((-caption.log_prob, caption.image_nats))
    errors = np.std(terms, axis=0) / math.sqrt(len(terms))
    assert (errors < 0.03).all()
    assert (np.abs(np.mean(terms, axis=0) - (caption_nats(), picture_nats())) < 4 * errors).all()


@pytest.mark.slow
@pytest.mark.parametrize(("floor", "least"), [(False, -11.5), (True, -15.0)])
def test_log_probabilities_match_frequencies(floor: bool, least: float) -> None:
    """One half of the samples selects captions, the other half counts them, which makes the check unbiased."""
    number, count = int(floor), 30_000
    assert (STRATA[number].family, STRATA[number].floor) == ("single", floor)
    scenes, of_stratum = enumerations("trained")[number], math.log(STRATA[number].share / BLOCK)
    order = np.random.default_rng(0).integers(scenes.size, size=(2, count)).tolist()

    def captions(half: int) -> Iterator[Description]:
        return (describe(scenes[place], f"{half}/{index}") for index, place in enumerate(order[half]))

    log_probs = {one.text: one.log_prob - of_stratum for one in captions(0) if one.log_prob - of_stratum > least}
    found = sum(caption.text in log_probs for caption in captions(1))
    expected = count * sum(math.exp(value) for value in log_probs.values())
    assert expected > 30
    assert abs(found - expected) < 4 * math.sqrt(expected)


def test_the_pictures_of_a_caption_are_as_many_as_its_nats_say() -> None:
    """Counted over all scenes of a stratum whose caption in a style is the same."""
    for floor, style in product((False, True), ("a", "b", "c", "d")):
        number = next(n for n, stratum in enumerate(STRATA) if stratum == Stratum("group", 3, floor, stratum.share))
        scenes = enumerations("held_out")[number]
        step = 1 if not floor else len(scenes.contents)  # with a floor, the scenes of one color and kind
        captions = [describe(scenes[place], style) for place in range(0, scenes.size, step)]
        counts = Counter(caption.text for caption in captions)
        for caption in captions[:50]:
            assert math.log(counts[caption.text]) == pytest.approx(caption.image_nats)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_altered_captions_differ_in_one_attribute(attribute: str) -> None:
    mentioned = 0
    for index in range(300):
        scene = draw_scene(0, "compositional", index)
        true, other = describe(scene, f"s{index}").text, altered(scene, f"s{index}", attribute, "seed")
        if other is None:
            continue
        mentioned += 1
        words, others = Counter(true.lower().split()), Counter(other.lower().split())
        assert 0 < ((words - others) + (others - words)).total() <= 8, (true, other)
    assert mentioned > 20


def test_scenes_of_an_earlier_version_are_refused() -> None:
    meaning = draw_scene(0, "train", 0).meaning()
    assert scene_from_meaning(meaning) == draw_scene(0, "train", 0)
    del meaning["floor"], meaning["horizon"]
    with pytest.raises(ValueError, match="scenes of an earlier version"):
        scene_from_meaning(meaning)


def test_an_unknown_attribute_is_rejected_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="background, floor, colour"):
        altered(draw_scene(0, "compositional", 0), "s", "shape", "seed")

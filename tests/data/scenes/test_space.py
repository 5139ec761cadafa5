import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from t2i_lm.config.sections import DataConfig
from t2i_lm.data.scenes.scene import ALL_PAIRS, COLOURS, HELD_OUT, KINDS, Scene, render
from t2i_lm.data.scenes.source import SceneSource
from t2i_lm.data.scenes.space import (
    BLOCK,
    RESERVED_BLOCKS,
    SPLITS,
    STRATA,
    draw_scene,
    enumerations,
    largest,
    placements,
)
from t2i_lm.data.shards.tokenize import encode_images
from t2i_lm.data.sources import open_source
from t2i_lm.tokenizers.image import open_image_tokenizer
from t2i_lm.tokenizers.layout import IntArray


def scenes(split: str, count: int, seed: int = 0) -> Iterator[Scene]:
    return (draw_scene(seed, split, index) for index in range(count))


def pixels(scene: Scene) -> bytes:
    return hashlib.blake2b(render(scene).tobytes(), digest_size=16).digest()


def test_the_space_holds_tens_of_millions_of_pictures() -> None:
    sizes = {space: sum(part.size for part in enumerations(space)) for space in ("trained", "held_out", "every_pair")}
    assert sizes["trained"] == 67_559_328
    assert sizes["trained"] + sizes["held_out"] == sizes["every_pair"] > 10**7
    # A million of them at once, each stratum by its share.
    assert largest("train") == 975_200
    assert {len(placements(*key)) for key in (("pair", 2), ("group", 2), ("group", 3))} == {46, 48, 16}


def test_scenes_are_a_function_of_seed_split_and_index() -> None:
    assert draw_scene(0, "train", 7) == draw_scene(0, "train", 7)
    assert sum(a == b for a, b in zip(scenes("train", 200), scenes("train", 200, seed=1), strict=True)) == 0
    # Golden: scenes that change need another version of the shards' format.
    described = "".join(repr(draw_scene(0, split, 123)) for split in SPLITS)
    assert hashlib.sha256(described.encode()).hexdigest()[:16] == "3bf4b570433e91f1"


@pytest.mark.slow
def test_no_picture_of_a_run_recurs() -> None:
    seen = [pixels(scene) for split in ("train", "iid", "compositional") for scene in scenes(split, 1000)]
    assert len(set(seen)) == len(seen)


def ids_of(several: Sequence[Scene]) -> IntArray:
    """Ids (B, N) of the shipped image tokenizer."""
    return encode_images(open_image_tokenizer("asset:image_tokenizer", 64), map(render, several))


@pytest.mark.slow
def test_no_ids_of_a_run_recur() -> None:
    counts = {"train": 200, "iid": 50, "compositional": 50}
    ids_BN = ids_of([scene for split, count in counts.items() for scene in scenes(split, count)])
    assert len(np.unique(ids_BN, axis=0)) == len(ids_BN)


@pytest.mark.slow
def test_scenes_that_differ_in_one_choice_have_other_ids() -> None:
    """Without this, the entropy of an image given its caption would be no floor of the loss of its ids."""
    random, pairs = np.random.default_rng(0), []
    for part in enumerations("trained"):
        for number in map(int, random.integers(0, part.size, 4)):
            step = 1
            for radix in part.choices:
                last = number // step % radix == radix - 1
                pairs += (
                    [] if radix == 1 else [(part[number], part[number - step * (radix - 1) if last else number + step])]
                )
                step *= radix
    assert len(pairs) > 100
    ids_BN = ids_of([scene for pair in pairs for scene in pair])
    assert (ids_BN[::2] != ids_BN[1::2]).any(axis=1).all()


def test_no_scene_of_a_run_recurs() -> None:
    for splits in (("train", "iid", "compositional"), ("every_pair", "every_pair_val")):
        seen = [scene for split in splits for scene in scenes(split, 3000)]
        # The last scenes of training, and those of the split at the other end of the same space.
        front, back = splits[:2]
        seen += [draw_scene(0, front, largest(front) - 1 - index) for index in range(300)]
        seen += [draw_scene(0, back, largest(back) - 1 - index) for index in range(300)]
        assert len(set(seen)) == len(seen)


def test_a_whole_stratum_has_different_pictures() -> None:
    number = next(n for n, stratum in enumerate(STRATA) if (stratum.count, stratum.floor) == (3, False))
    whole = enumerations("held_out")[number]
    assert len({pixels(whole[place]) for place in range(whole.size)}) == whole.size


@pytest.mark.parametrize("split", SPLITS)
def test_every_block_has_its_share_of_each_stratum_in_an_order_of_its_own(split: str) -> None:
    orders = set()
    for block in range(4):
        drawn = [draw_scene(3, split, block * BLOCK + place) for place in range(BLOCK)]
        kinds = [(scene.family, len(scene.objects), scene.floor is not None) for scene in drawn]
        assert Counter(kinds) == {(one.family, one.count, one.floor): one.share for one in STRATA}
        orders.add(tuple(kinds))
    assert len(orders) == 4


def test_held_out_pairs_never_occur_in_training_and_always_in_compositional_scenes() -> None:
    for index in range(2000):
        train, iid, compositional = (
            {(item.colour, item.kind) for item in draw_scene(0, split, index).objects}
            for split in ("train", "iid", "compositional")
        )
        assert not (train | iid) & HELD_OUT
        assert compositional & HELD_OUT


def test_at_most_one_pair_per_color_and_kind_is_held_out() -> None:
    assert len(HELD_OUT) == 6
    assert max(Counter(colour for colour, _ in HELD_OUT).values()) == 1
    assert {kind for _, kind in HELD_OUT} == set(KINDS)
    assert {colour for colour, _ in HELD_OUT} <= set(COLOURS)


def test_the_tokenizer_is_trained_and_validated_on_every_pair() -> None:
    for split in ("every_pair", "every_pair_val"):
        assert {(item.colour, item.kind) for scene in scenes(split, 2000) for item in scene.objects} == set(ALL_PAIRS)
    data = DataConfig(train_size=9, val_size=9, hold_out_pairs=False)
    for split, expected in (("train", "every_pair"), ("val", "every_pair_val")):
        pair = open_source(data, split, 64)[7]
        assert pair.meaning == draw_scene(0, expected, 7).meaning() | {"style": f"0/{expected}/7"}


def test_choices_are_uniform_within_a_stratum() -> None:
    drawn = list(scenes("train", 8000))
    pairs = [scene for scene in drawn if scene.family == "pair"]
    for values, of in (
        ([scene.background for scene in drawn], 8),
        ([scene.horizon for scene in drawn if scene.horizon], 4),
        ([scene.arrangement for scene in pairs], 2),
        ([scene.objects[0].size for scene in pairs], 2),
        ([(item.x, item.y) for scene in drawn if scene.family == "single" for item in scene.objects], 25),
    ):
        counts = np.array(list(Counter(values).values()))
        expected = len(values) / of
        assert len(counts) == of
        assert (np.abs(counts - expected) < 4.5 * np.sqrt(expected)).all()


def test_no_picture_has_two_descriptions() -> None:
    """The two shapes of a pair are never as far beside as above each other; groups name each set of places once."""
    for arrangement, ((ax, ay), (bx, by)) in placements("pair", 2):
        across, down = bx - ax, by - ay
        assert (
            (across, abs(down) < 32) == (32, True) if arrangement == "left" else (down, abs(across) < 32) == (32, True)
        )
    for count in (2, 3):
        sets = [frozenset(points) for _, points in placements("group", count)]
        assert len(set(sets)) == len(sets)
        assert all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= 32 for one in sets for a in one for b in one - {a})


def test_more_scenes_than_there_are_is_an_error_that_names_the_key() -> None:
    assert len(SceneSource(largest("train"), "train", 0)) == largest("train")
    with pytest.raises(ValueError, match=r"data.train_size=975201: expected at most 975,200"):
        open_source(DataConfig(train_size=975_201, val_size=1), "train", 64)
    with pytest.raises(ValueError, match=r"data.val_size=153601: expected at most 153,600"):
        open_source(DataConfig(train_size=1, val_size=153_601), "val/compositional", 64)
    with pytest.raises(ValueError, match=rf"expected at most {RESERVED_BLOCKS * BLOCK:,}"):
        SceneSource(RESERVED_BLOCKS * BLOCK + 1, "iid", 0)
    with pytest.raises(ValueError, match="the split iid has 100,000 scenes"):
        draw_scene(0, "iid", 100_000)


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected one of train, iid, compositional"):
        draw_scene(0, "val", 0)
    with pytest.raises(ValueError, match="expected one of train, iid, compositional"):
        SceneSource(1, "val", 0)

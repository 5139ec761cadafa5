"""What an image id tells of its cell of a scene."""

import json

import numpy as np
import pytest
import torch

from t2i_lm.data.scenes.cells import cell_names, code_meaning, scenes_of
from t2i_lm.data.scenes.oracle import GROUNDS, open_oracle, scene_ids
from t2i_lm.data.scenes.scene import COLOURS, KINDS, Scene, SceneObject
from t2i_lm.data.scenes.source import SceneSource

SOURCE = SceneSource(60, "train", 0)
SCENES = [SOURCE.scene(index) for index in range(60)]
IDS_RHW = np.stack([scene_ids(scene) for scene in SCENES])


def test_names_of_cells_are_those_of_ground_and_shape() -> None:
    scene = Scene("single", "white", (SceneObject("pink", "star", "small", 16, 24),), None, "navy", 40)
    names = cell_names(scene)
    assert names["ground"][0, 0] == GROUNDS.index("white")
    assert names["ground"][7, 7] == GROUNDS.index("navy")
    inside = np.zeros((8, 8), dtype=bool)
    inside[2:4, 1:3] = True
    for attribute, number in (("colour", list(COLOURS).index("pink")), ("kind", KINDS.index("star")), ("size", 0)):
        assert (names[attribute][inside] == number).all()
        assert (names[attribute][~inside] == -1).all()
    assert (names["ground"][inside] == -1).all()
    assert len(np.unique(names["name"])) == 3


def test_ids_of_pixels_are_those_of_the_scene() -> None:
    images_BCHW = torch.stack([torch.from_numpy(np.array(SOURCE[index].image)).permute(2, 0, 1) for index in range(8)])
    assert np.array_equal(open_oracle(None, 64).encode(images_BCHW).view(-1, 8, 8).numpy(), IDS_RHW[:8])


def test_the_oracle_explains_all_and_equal_ids_nothing() -> None:
    for attribute, found in code_meaning(IDS_RHW, SCENES).items():
        assert found["explained"] == pytest.approx(1, abs=0.02), attribute
    for found in code_meaning(np.zeros_like(IDS_RHW), SCENES).values():
        assert found["explained"] == 0
        assert found["guessed"] == found["chance"]
    colors = np.where(len(GROUNDS) > IDS_RHW, IDS_RHW, len(GROUNDS) + cell_names_of("colour"))
    half = code_meaning(colors, SCENES)
    assert half["colour"]["explained"] == pytest.approx(1, abs=0.02)
    assert half["colour"]["guessed"] == 1
    assert half["kind"]["explained"] < 0.5
    assert half["kind"]["cells"] + half["ground"]["cells"] == IDS_RHW.size


def test_one_image_has_no_share_of_guesses() -> None:
    found = code_meaning(IDS_RHW[:1], SCENES[:1])["ground"]
    assert found.keys() == {"bits", "explained", "cells"}


def cell_names_of(attribute: str) -> np.ndarray:
    return np.stack([cell_names(scene)[attribute] for scene in SCENES])


def test_scenes_are_read_from_shards_where_they_have_some() -> None:
    texts = [json.dumps(SOURCE[index].meaning) for index in range(3)]  # as in shards, with the style of the caption
    assert scenes_of(texts) == SCENES[:3]
    assert scenes_of(["", ""]) is None
    former = json.loads(texts[0])
    del former["floor"]
    assert scenes_of([json.dumps(former)]) is None

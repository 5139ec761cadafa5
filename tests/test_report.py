import numpy as np
import pytest

from t2i_lm.data.scene_source import SceneSource
from t2i_lm.grid import MARGIN, PIXELS, captioned_grid
from t2i_lm.report import prompt_accuracy


def test_accuracy_is_one_for_the_scenes_asked_for_and_low_for_others() -> None:
    source = SceneSource(60, "val", 0)
    pairs = [source[index] for index in range(60)]
    meanings = [pair.meaning or {} for pair in pairs]
    pictures = [np.asarray(pair.image) for pair in pairs]
    perfect = prompt_accuracy(pictures, meanings)
    assert {name: entry["right"] for name, entry in perfect.items()} == dict.fromkeys(perfect, 1.0)
    assert perfect["relation"]["of"] == sum(meaning["family"] == "pair" for meaning in meanings)
    assert perfect["background"]["of"] < 60  # some captions leave it out
    shifted = prompt_accuracy(pictures[1:] + pictures[:1], meanings)
    assert shifted["all"]["right"] < 0.1
    assert shifted["background"]["right"] < 0.4


def test_a_grid_shows_every_picture_with_its_caption() -> None:
    black = np.zeros((64, 64, 3), dtype=np.uint8)
    grid = np.asarray(captioned_grid([black] * 5, ["a caption"] * 5))
    assert grid.shape[1] == 4 * (PIXELS + 2 * MARGIN)
    blacks = (grid == 0).all(axis=-1).sum()
    assert blacks >= 5 * PIXELS**2
    with pytest.raises(ValueError, match="5 pictures for 4 captions"):
        captioned_grid([black] * 5, ["a"] * 4)

import math
from dataclasses import replace

import numpy as np
import pytest

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig
from t2i_lm.data.scenes.captions import caption_nats, picture_nats
from t2i_lm.data.scenes.source import SceneSource
from t2i_lm.data.scenes.space import enumerations, scene_nats
from t2i_lm.evaluation import scenes
from t2i_lm.evaluation.scenes import image_floor, loss_floors, text_floor
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.text import open_text_tokenizer


@pytest.fixture(autouse=True)
def _as_many_captions_as_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "FLOOR_CAPTIONS", 19_200)
    monkeypatch.setattr(scenes, "_caption_lengths", lengths)


lengths: dict[tuple[str, bool], float] = {}


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return open_text_tokenizer("asset:lm_rotary/text_tokenizer.model")


def test_the_text_floor_is_that_of_the_generator_whatever_is_trained_on(text: TextTokenizer) -> None:
    captions = [SceneSource(2000, "train", seed).caption(index) for seed in (1, 2, 3) for index in range(2000)]
    lengths = np.array([len(text.encode(caption)) for caption in captions])
    other = caption_nats() / lengths.mean()
    assert text_floor(text) == pytest.approx(other, rel=4 * lengths.std() / lengths.mean() / len(lengths) ** 0.5)
    assert text_floor(text) == pytest.approx(0.9767, abs=0.0001)
    ratio = caption_nats("every_pair") / caption_nats()
    assert text_floor(text, hold_out_pairs=False) == pytest.approx(ratio * text_floor(text), rel=0.01)


def test_floors_are_entropies_per_token() -> None:
    assert image_floor(64) == pytest.approx(picture_nats() / 64)
    # Golden: another grammar or space needs another version of the shards' format.
    assert caption_nats() == pytest.approx(23.5425739134515)
    assert caption_nats("every_pair") == pytest.approx(23.74514589538373)
    assert picture_nats() == pytest.approx(4.8844443461838996)


def test_floors_are_those_of_the_task_and_its_captions(text: TextTokenizer) -> None:
    captioned = {"text_floor_nll": text_floor(text), "image_floor_nll": image_floor(64)}
    assert loss_floors(ExperimentConfig(), text, 64) == captioned
    assert loss_floors(ExperimentConfig(data=DataConfig(text_ratio=0.2)), text, 64) == captioned
    joined = ExperimentConfig(data=DataConfig(text_ratio=0.5))
    assert loss_floors(joined, text, 64) == {}, "several captions tell more of an image"
    assert loss_floors(ExperimentConfig(data=DataConfig(source="image_folder", path="x")), text, 64) == {}
    unconditional = ExperimentConfig(task="unconditional")
    assert loss_floors(unconditional, text, 64) == {"image_floor_nll": scene_nats() / 64}
    everything = replace(unconditional, data=DataConfig(hold_out_pairs=False))
    assert loss_floors(everything, text, 64) == {"image_floor_nll": scene_nats("every_pair") / 64}


def test_the_entropy_of_a_picture_lies_between_its_bounds() -> None:
    assert picture_nats() < scene_nats() < caption_nats() + picture_nats(), "captions of one picture differ in words"
    assert scene_nats() < math.log(sum(scenes.size for scenes in enumerations("trained")))
    assert scene_nats() == pytest.approx(16.81892067896233)

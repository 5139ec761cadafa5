import math
from dataclasses import replace

import pytest

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig
from t2i_lm.data.scenes.captions import caption_nats, picture_nats
from t2i_lm.data.scenes.space import enumerations, scene_nats
from t2i_lm.evaluation.scenes import image_floor, loss_floors, text_floor


def test_floors_are_entropies_per_token() -> None:
    index = {"splits": {"train": {"caption_tokens": {"20": 3, "40": 1}}}}
    assert text_floor(index) == pytest.approx(caption_nats() / 25)
    assert image_floor(64) == pytest.approx(picture_nats() / 64)
    # Golden: another grammar or space needs another version of the shards' format.
    assert caption_nats() == pytest.approx(23.5425739134515)
    assert caption_nats("every_pair") == pytest.approx(23.74514589538373)
    assert text_floor(index, hold_out_pairs=False) == pytest.approx(caption_nats("every_pair") / 25)
    assert picture_nats() == pytest.approx(4.8844443461838996)


def test_floors_are_those_of_the_task_and_its_captions() -> None:
    index = {"splits": {"train": {"caption_tokens": {"25": 1}}}}
    captioned = {"text_floor_nll": text_floor(index), "image_floor_nll": image_floor(64)}
    assert loss_floors(ExperimentConfig(), index, 64) == captioned
    assert loss_floors(ExperimentConfig(data=DataConfig(text_ratio=0.2)), index, 64) == captioned
    joined = ExperimentConfig(data=DataConfig(text_ratio=0.5))
    assert loss_floors(joined, index, 64) == {}, "several captions tell more of an image"
    assert loss_floors(ExperimentConfig(data=DataConfig(source="image_folder", path="x")), index, 64) == {}
    unconditional = ExperimentConfig(task="unconditional")
    assert loss_floors(unconditional, index, 64) == {"image_floor_nll": scene_nats() / 64}
    everything = replace(unconditional, data=DataConfig(hold_out_pairs=False))
    assert loss_floors(everything, index, 64) == {"image_floor_nll": scene_nats("every_pair") / 64}


def test_the_entropy_of_a_picture_lies_between_its_bounds() -> None:
    assert picture_nats() < scene_nats() < caption_nats() + picture_nats(), "captions of one picture differ in words"
    assert scene_nats() < math.log(sum(scenes.size for scenes in enumerations("trained")))
    assert scene_nats() == pytest.approx(16.81892067896233)

import pytest

from t2i_lm.data.scenes.captions import caption_nats, picture_nats
from t2i_lm.evaluation.scenes import image_floor, text_floor


def test_floors_are_entropies_per_token() -> None:
    index = {"splits": {"train": {"caption_tokens": {"20": 3, "40": 1}}}}
    assert text_floor(index) == pytest.approx(caption_nats() / 25)
    assert image_floor(64) == pytest.approx(picture_nats() / 64)
    # Golden: another grammar or space needs another version of the shards' format.
    assert caption_nats() == pytest.approx(23.5425739134515)
    assert caption_nats("every_pair") == pytest.approx(23.74514589538373)
    assert text_floor(index, hold_out_pairs=False) == pytest.approx(caption_nats("every_pair") / 25)
    assert picture_nats() == pytest.approx(4.8844443461838996)

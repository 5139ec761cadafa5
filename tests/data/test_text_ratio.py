"""`data.text_ratio`: the realized ratio on generated scenes, and on captions of any lengths."""

from pathlib import Path

import numpy as np
import pytest

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig
from t2i_lm.data.datamodules import PairBatches, PairDataModule
from t2i_lm.data.scenes.source import SceneSource, paraphrases
from t2i_lm.data.shards.format import pair_features, part_folder, read_part, write_index, write_part
from t2i_lm.data.sources import open_source
from t2i_lm.data.text_ratio import TextRatio
from t2i_lm.tokenizers.joint_vocab import JointVocab
from t2i_lm.tokenizers.layout import Layout
from t2i_lm.tokenizers.text import open_text_tokenizer

TOKENS = 64
SAMPLES = 4000
RATIOS = [1 / 30, 1 / 10, 1 / 3, 0.4, 1.0]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def captions() -> list[list[np.ndarray]]:
    """Ids of five captions of each of many scenes, by the demo's tokenizer."""
    text = open_text_tokenizer(ROOT / "t2i_lm/assets/lm_rotary/text_tokenizer.model")
    source = SceneSource(SAMPLES, "train", 0, captions=5)
    return [[np.array(text.encode(caption)) for caption in source[index].captions] for index in range(SAMPLES)]


def lengths_of(captions: list[list[np.ndarray]], each: int) -> dict[int, int]:
    sizes = [len(ids) for row in captions for ids in row[:each]]
    return dict(zip(*(values.tolist() for values in np.unique(sizes, return_counts=True)), strict=True))


@pytest.mark.parametrize("ratio", RATIOS)
def test_scenes_have_the_configured_ratio(captions: list[list[np.ndarray]], ratio: float) -> None:
    each = paraphrases(ratio)
    composer = TextRatio(ratio, TOKENS, 150, lengths_of(captions, each), seed=0)
    texts = [composer.compose(row.__getitem__, each, 0, 0, index) for index, row in enumerate(captions)]
    sizes = np.array([len(text) for text in texts])
    # Four standard errors, which are at most 3 % except where nine captions in ten are left out.
    error = sizes.std() / np.sqrt(SAMPLES)
    assert abs(sizes.mean() - ratio * TOKENS) < 4 * error
    assert error < (0.05 if ratio < 0.1 else 0.03) * ratio * TOKENS
    joined = [text for text, row in zip(texts, captions, strict=True) if len(text) > len(row[0])]
    assert bool(joined) == (ratio >= 0.4)
    for text, row in zip(texts, captions, strict=True):
        if len(text):
            assert text[: len(row[0])].tolist() == row[0].tolist()


def test_different_captions_come_before_repeats() -> None:
    captions = [np.array([number] * 10) for number in range(4)]
    composer = TextRatio(1.0, 60, 100, {10: 1}, seed=0)
    orders = set()
    for index in range(50):
        text = composer.compose(captions.__getitem__, 4, index % 4, 0, index)
        order = text[::10].tolist()
        assert len(order) == 6
        assert order[0] == index % 4
        assert sorted(order[:4]) == [0, 1, 2, 3]
        assert order[4:] == order[:2]
        orders.add(tuple(order))
    assert len(orders) > 10


def test_a_text_is_a_function_of_seed_epoch_and_index(captions: list[list[np.ndarray]]) -> None:
    def texts(seed: int, epoch: int) -> list[list[int]]:
        composer = TextRatio(1.0, TOKENS, 150, lengths_of(captions, 5), seed)
        rows = enumerate(captions[:50])
        return [composer.compose(row.__getitem__, 5, 0, epoch, index).tolist() for index, row in rows]

    assert texts(0, 0) == texts(0, 0)
    assert sum(a != b for a, b in zip(texts(0, 0), texts(0, 1), strict=True)) > 25
    assert sum(a != b for a, b in zip(texts(0, 0), texts(1, 0), strict=True)) > 25


def test_long_captions_are_kept_whole_and_the_mean_is_right() -> None:
    lengths = {5: 50, 60: 50}
    composer = TextRatio(1.0, 40, 200, lengths, seed=0)
    sizes = []
    for index in range(4000):
        own = np.zeros(5 if index % 2 else 60)
        sizes.append(len(composer.compose([own].__getitem__, 1, 0, 0, index)))
    assert min(size for index, size in enumerate(sizes) if not index % 2) == 60
    assert np.mean(sizes) == pytest.approx(40, rel=0.01)


def test_empty_captions_stay_empty() -> None:
    composer = TextRatio(1.0, 40, 200, {0: 1, 30: 1}, seed=0)
    assert not len(composer.compose([np.zeros(0)].__getitem__, 1, 0, 0, 0))
    with pytest.raises(ValueError, match=r"data.text_ratio=1.0: expected null, the training captions are empty"):
        TextRatio(1.0, 40, 200, {0: 5}, seed=0)


def test_too_little_room_is_an_error_that_says_how_much_is_missing() -> None:
    lengths = {20: 1}
    with pytest.raises(
        ValueError, match=r"data.text_ratio=1.0: 64 text ids .* need 42 more positions; raise data.length"
    ):
        TextRatio(1.0, 64, 42, lengths, seed=0)
    assert TextRatio(1.0, 64, 84, lengths, seed=0).length == pytest.approx(64)


def test_only_training_is_changed(tmp_path: Path) -> None:
    layout = Layout(JointVocab(100, 8), image_tokens=4, length=24)
    splits = {}
    for split in ("train", "val"):

        def rows() -> object:
            for row in range(600):
                texts = [np.full(2, row % 90), np.full(2, row % 90 + 1)]
                yield {"id": str(row), "image_ids": np.full(4, row % 8), "text_ids": texts, "meaning": ""}

        target = part_folder(tmp_path, split, 0)
        target.parent.mkdir(parents=True)
        write_part(target, rows, pair_features(100, 4, 8), dict)
        splits[split] = {"rows": 600, "parts": [read_part(target)["sha256"]], "caption_tokens": {"2": 1200}}
    write_index(tmp_path, {"tokenizers": {}, "splits": splits})
    draws = [(0, index) for index in range(600)]
    batches = {}
    for ratio in (None, 0.25, 1.0):
        config = ExperimentConfig(data=DataConfig(length=24, text_ratio=ratio, captions="all"))
        data = PairDataModule(config, tmp_path, layout)
        data.setup("fit")
        val = data.val_sets["val"]
        assert isinstance(val, PairBatches)
        assert val.ratio is None
        batches[ratio] = data.train_set.__getitems__(draws)["ids_BT"]
    text = {ratio: float((ids_BT < 100).sum()) / 600 for ratio, ids_BT in batches.items()}
    assert text[None] == 2
    assert text[0.25] == pytest.approx(1, abs=0.15)
    assert text[1.0] == 4
    image = layout.vocab.image_offset
    assert (batches[None] >= image).sum() == (batches[1.0] >= image).sum() == (batches[0.25] >= image).sum()


def test_scenes_have_paraphrases_in_training_where_captions_are_joined() -> None:
    data = DataConfig(train_size=5, val_size=5, text_ratio=1.0)
    pair = open_source(data, "train", 64)[3]
    assert len(set(pair.captions)) == len(pair.captions) == 5
    assert pair.captions[0] == SceneSource(5, "train", 0)[3].captions[0]
    assert len(open_source(data, "val/iid", 64)[3].captions) == 1
    assert [paraphrases(ratio) for ratio in (None, 1 / 30, 1 / 3, 0.5, 1.0)] == [1, 1, 1, 3, 5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_ratio": 0.0}, r"data.text_ratio=0.0: expected null or a value in \(0, 1\]"),
        ({"text_ratio": 1.5}, r"data.text_ratio=1.5: expected null or a value in \(0, 1\]"),
        ({"text_ratio": 0.5, "caption_dropout": 0.1}, "data.caption_dropout=0.1: expected 0 where data.text_ratio"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


def test_other_tasks_refuse_a_ratio() -> None:
    with pytest.raises(ValueError, match=r"data.text_ratio=0.5: expected null with task=unconditional"):
        ExperimentConfig(task="unconditional", data=DataConfig(text_ratio=0.5))

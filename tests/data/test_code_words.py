"""The words of an image tokenizer whose codes are words, and batches of images with captions."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.image_tokenizer import ImageTokenizerConfig, VQModelConfig
from t2i_lm.config.sections import DataConfig, TextTokenizerConfig, TrainerConfig
from t2i_lm.data.captioned_images import CaptionedImageDataModule, CaptionedImages
from t2i_lm.data.code_words import code_words, distinct_words, words_in_captions
from t2i_lm.data.pairs import Pair
from t2i_lm.tokenizers.text import open_text_tokenizer
from t2i_lm.tokenizers.words import pieces_of

PATH = "asset:lm_rotary/text_tokenizer.model"


def config(words: str, codes: int = 512) -> ExperimentConfig:
    return ExperimentConfig(
        task="image_tokenizer",
        init="random",
        image_tokenizer=ImageTokenizerConfig(words=words, model=VQModelConfig(codes=codes)),
        text_tokenizer=TextTokenizerConfig(PATH),
        data=DataConfig(train_size=40, val_size=1, hold_out_pairs=False),
    )


def test_words_of_captions_come_first_and_frequent_ones_are_one_piece() -> None:
    text = open_text_tokenizer(PATH)
    frequent, captions = code_words(config("frequent"), text), code_words(config("captions"), text)
    for words in (frequent, captions):
        assert len(set(words)) == 512
        assert words == [word.lower() for word in words]
    assert {"the", "and"} < set(frequent[:5])
    assert all(len(pieces_of(text, word)) == 1 for word in frequent)
    assert {"a", "floor", "orange", "star"} < set(captions[:90])
    assert len(pieces_of(text, "orange")) > 1
    assert captions[200:] != frequent[200:]
    assert set(captions[200:]) < set(frequent) | set(captions[:200])


def test_words_of_no_or_unknown_or_equal_pieces_are_left_out() -> None:
    pieces = {"a": [7], "red": [1], "Red": [1], "tar": [2, 3], "rat": [3, 2], "snow": [0], "": []}

    class Pieces:
        def encode(self, text: str) -> list[int]:
            return [piece for word in text.split(" ") for piece in pieces[word]]

        def decode(self, ids: Any) -> str:
            return {(1,): "red", (2, 3): "tar", (3, 2): "rat", (0,): "<unk>", (7,): "a"}.get(tuple(ids), "")

    assert distinct_words(["red", "Red", "tar", "rat", "snow", ""], cast("Any", Pieces())) == ["red", "tar"]


def test_too_few_words_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^image_tokenizer\.model\.codes=9000: image_tokenizer\.words=frequent gives"):
        code_words(config("frequent", 9000), open_text_tokenizer(PATH))


def test_words_in_captions_are_counted_beside_those_of_other_captions() -> None:
    ids_RN = np.array([[0, 1], [2, 2]])
    shares = words_in_captions(ids_RN, ["A Red star.", "Two blue rings"], ["red", "two", "blue"])
    assert shares == {"right": 0.75, "chance": 0.25}
    assert words_in_captions(ids_RN[:1], ["A Red star."], ["red", "two", "blue"]) == {"right": 0.5}


class Pairs:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Pair:
        image = Image.new("RGB", (8, 8), (index // 2, 0, 0))
        return Pair(str(index), image, [f"a red star {index}", "two blue rings"], None)


def test_images_come_with_their_captions_and_hashes_of_both() -> None:
    text = open_text_tokenizer(PATH)
    first = CaptionedImages(Pairs(), 8, text, "first", 0).__getitems__([(0, 0), (0, 1), (0, 2)])
    assert first["images_BCHW"].shape == (3, 3, 8, 8)
    starts = [*first["text_starts_B"].tolist(), None]
    texts = [text.decode(first["text_ids_L"][start:end].tolist()) for start, end in pairwise(starts)]
    assert texts == ["a red star 0", "a red star 1", "a red star 2"]
    caption_B, image_B = first["hashes_B2"].T
    assert len(caption_B.unique()) == 3
    assert image_B[0] == image_B[1] != image_B[2]
    draws = CaptionedImages(Pairs(), 8, text, "random", 0)
    seen = {bytes(draws.__getitems__([(epoch, 0)])["text_ids_L"].numpy()) for epoch in range(12)}
    assert len(seen) == 2
    assert torch.equal(draws.__getitems__([(3, 1)])["text_ids_L"], draws.__getitems__([(3, 1)])["text_ids_L"])


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_captions_are_compared_in_the_same_batches_on_any_number_of_devices(devices: int) -> None:
    settings = replace(
        config("frequent"),
        image_tokenizer=ImageTokenizerConfig(caption_weight=0.1),
        data=DataConfig(train_size=40, val_size=11, batch_size=4),
        trainer=TrainerConfig(devices=devices),
    )
    data = CaptionedImageDataModule(settings, open_text_tokenizer(PATH))
    data.setup("fit")
    of_ranks = []
    for rank in range(devices):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=devices)  # type: ignore[assignment]
        of_ranks.append(data.validation_batches(data.val_set))
    compared = [
        [index for part in parts for _, index in part] for parts in zip(*(one[:2] for one in of_ranks), strict=True)
    ]
    assert compared == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sorted(index for one in of_ranks for batch in one[2:] for _, index in batch) == [8, 9, 10]
    for one in of_ranks:
        assert [data.val_set.__getitems__(batch)["is_compared"] for batch in one] == [True, True, False][: len(one)]


def test_validation_splits_of_less_than_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^data\.val_size=3: expected null or at least a batch: captions"):
        replace(
            config("frequent"),
            image_tokenizer=ImageTokenizerConfig(caption_weight=0.1),
            data=DataConfig(val_size=3, batch_size=4),
        )

"""Image tokenizers of any number of codes: the ids that they give are the ids that are trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.image_tokenizer import ImageTokenizerConfig
from t2i_lm.config.sections import DataConfig
from t2i_lm.data.datamodules import PairBatches
from t2i_lm.data.scenes.source import SceneSource
from t2i_lm.data.shards.columns import PairColumns
from t2i_lm.data.shards.parts import Parts
from t2i_lm.data.shards.prepare import prepare_pairs
from t2i_lm.data.shards.tokenize import encode_images
from t2i_lm.tokenizers.joint_vocab import JointVocab
from t2i_lm.tokenizers.layout import Layout
from tests.data.shards.test_rejects import Codes, Letters


class Pixels(Codes):
    """Each corner pixel's color is a code."""

    image_size, grid = 64, (1, 2)

    def encode(self, images_uint8_BCHW: torch.Tensor, low_precision: bool = False) -> torch.Tensor:
        red, green, blue = images_uint8_BCHW[:, :, [0, 32], [0, 32]].long().unbind(1)
        return (red * 2**16 + green * 2**8 + blue) % self.vocab_size


@pytest.mark.parametrize("codes", [1000, 2**16, 2**16 + 1, 2**24])
def test_ids_come_back(tmp_path: Path, codes: int) -> None:
    data = DataConfig(train_size=20, val_size=4, cache_dir=str(tmp_path))
    config = ExperimentConfig(data=data, image_tokenizer=ImageTokenizerConfig(size=64))
    image, scenes = Pixels(codes), SceneSource(20, "train", 0)
    parts = Parts(prepare_pairs(config, Letters(), image), "train")
    expected_BN = encode_images(image, (np.asarray(scenes[row].image) for row in range(20)))
    assert expected_BN.max() > min(codes // 2, 2**16)
    rows = list(range(20))
    columns = PairColumns(parts)
    assert np.array_equal(columns.images(rows), expected_BN)
    assert columns.images(rows).dtype == (np.uint16 if codes <= 2**16 else np.uint32)
    vocab = JointVocab(256, codes)
    batch = PairBatches(parts, Layout(vocab, 2, 100), "first", 0, 1).__getitems__([(0, row) for row in rows])
    joint = [row[row >= vocab.image_offset] - vocab.image_offset for row in batch["ids_BT"]]
    assert torch.equal(torch.stack(joint), torch.from_numpy(expected_BN))

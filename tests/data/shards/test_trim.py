"""`data.pad_to_multiple_of` changes the length of batches and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig
from t2i_lm.data.datamodules import PairBatches
from t2i_lm.data.shards.cache import shards_of
from t2i_lm.data.shards.parts import Parts
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.open_lm import decoder_config
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.tokenizers.layout import Layout
from tests.data.shards.test_columns import write

LENGTH = 40
SIZES = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": LENGTH, "vocab_size": 100}
DRAWS = [(0, row) for row in range(5)]


def test_trim_changes_batch_lengths_but_not_tokens_loss_or_gradients(tmp_path: Path) -> None:
    write(tmp_path)
    split = Parts(tmp_path, "train")
    decoder = Decoder(decoder_config(SIZES | {"positional_embedding_type": "rotary"}))
    decoder.reset_parameters(torch.Generator().manual_seed(1))
    layout = Layout(expand_vocabulary(decoder, 8, torch.Generator().manual_seed(2)), 4, LENGTH)
    module = TextToImageModule(decoder, ExperimentConfig(data=DataConfig(length=LENGTH)), layout)
    results = {}
    for trim in (1, 8, 32, 64):
        batch = PairBatches(split, layout, "first", 0, trim).__getitems__(DRAWS)
        ids_BT = batch.pop("ids_BT")
        module.zero_grad()
        total = module.sums(ids_BT)[0]
        total.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in decoder.parameters()])
        results[trim] = (ids_BT, batch, total.item(), gradient)
    longest = 4 + 6 + 4  # the last row's caption, boundaries, image ids
    assert {trim: ids_BT.shape[1] for trim, (ids_BT, *_) in results.items()} == {1: longest, 8: 16, 32: 32, 64: LENGTH}
    ids_BT, counts, loss, gradient = results[8]
    for other_BT, other_counts, other_total, other_gradient in results.values():
        assert torch.equal(other_BT[:, :longest], ids_BT[:, :longest])
        assert other_counts == counts
        assert other_total == pytest.approx(loss, rel=1e-6)
        assert (other_gradient - gradient).norm() <= 1e-6 * gradient.norm()


def test_shards_do_not_depend_on_trim() -> None:
    config = ExperimentConfig()
    wide = replace(config, data=replace(config.data, pad_to_multiple_of=32))
    assert shards_of(wide, {"text": "a"}).folder == shards_of(config, {"text": "a"}).folder

"""The codebook of an image tokenizer in training: its first entries, and those that replace unused ones."""

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.image_tokenizer import ImageTokenizerConfig, VQModelConfig
from t2i_lm.modules import image_tokenizer
from t2i_lm.modules.image_tokenizer import ImageTokenizerModule, spread_out
from t2i_lm.tokenizers.vq import PatchedVQ

MODEL = VQModelConfig(block_out_channels=[16, 16], codes=16, code_dim=4)


@pytest.fixture
def module() -> ImageTokenizerModule:
    torch.manual_seed(0)
    config = ExperimentConfig(task="image_tokenizer", init="random", image_tokenizer=ImageTokenizerConfig(model=MODEL))
    made = ImageTokenizerModule(PatchedVQ(MODEL), config)
    made.recent.normal_()
    return made


def test_seeds_are_those_of_scipy() -> None:
    points_NE = np.random.default_rng(0).normal(size=(500, 4))
    theirs, _ = kmeans2(points_NE, 40, minit="++", rng=7)
    ours, _ = kmeans2(points_NE, spread_out(points_NE, 40, 7), minit="matrix")
    assert np.array_equal(ours, theirs)


def test_unused_codes_become_finite_latents(module: ImageTokenizerModule) -> None:
    """Also after a step that was skipped because its latents were not finite."""
    module.recent[:1000] = float("nan")
    module.recent[1000:2000] = float("inf")
    before = module.model.codebook.clone()
    module.used[:10] = 1
    module._restart_unused()
    assert torch.equal(module.model.codebook[:10], before[:10])
    finite = module.recent[2000:]
    assert all((finite == code).all(dim=1).any() for code in module.model.codebook[10:])
    assert not module.used.any()


@pytest.mark.parametrize("harm", [float("nan"), float("inf"), None])
def test_ranks_of_other_latents_take_part_in_a_restart(
    harm: float | None, module: ImageTokenizerModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether one has latents to choose from must not decide whether it joins the broadcast."""
    calls = []

    def broadcast(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        return tensor

    monkeypatch.setattr(image_tokenizer, "_from_rank_zero", broadcast)
    if harm is None:
        module.recent.copy_(module.model.codebook[0].expand_as(module.recent))  # no distance to a code
    else:
        module.recent.fill_(harm)
    module._restart_unused()
    assert len(calls) == 1
    assert module.model.codebook.isfinite().all()

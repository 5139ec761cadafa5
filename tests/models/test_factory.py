from dataclasses import replace

import pytest
import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import BackboneConfig
from t2i_lm.models.factory import copy_text_rows, pretrained_backbone, random_backbone
from t2i_lm.models.matched_weights import shuffle_entries
from tests.decoders import tiny_decoder as tiny


def test_shuffling_permutes_the_entries_of_every_tensor() -> None:
    before, after = tiny(), tiny()
    shuffle_entries(after, torch.Generator().manual_seed(1))
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values), name
        constant = bool((old == old.flatten()[0]).all())
        assert torch.equal(old, new) == constant, name


def test_only_text_rows_are_copied() -> None:
    source, target = tiny(), tiny()
    target.reset_parameters(torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in target.named_parameters()}
    copy_text_rows(source, target)
    for name, value in target.named_parameters():
        rows = name in ("tok_embeddings.text", "output.text")
        assert torch.equal(value, dict(source.named_parameters())[name] if rows else before[name]), name


def test_pre_trained_weights_keep_the_positions_that_they_were_trained_with() -> None:
    def config(positional: str) -> ExperimentConfig:
        return replace(ExperimentConfig(), backbone=BackboneConfig("asset:lm_rotary", positional=positional))

    pretrained_backbone(config("rotary"))
    random_backbone(config("head_rotary"))
    with pytest.raises(ValueError, match=r"backbone.positional='head_rotary': expected null or rotary, with which"):
        pretrained_backbone(config("head_rotary"))

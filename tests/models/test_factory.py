import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from t2i_lm.assets import resolve
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.config.sections import BackboneConfig, OptimConfig
from t2i_lm.experiment.build import build_model
from t2i_lm.experiment.dry_run import plan
from t2i_lm.models.factory import copy_text_rows, pretrained_backbone, random_backbone
from t2i_lm.models.matched_weights import shuffle_entries
from t2i_lm.modules.optim import muon
from tests.decoders import tiny_decoder as tiny
from tests.runs import EXPERIMENTS

RULES = ("muon", "adamw")


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


@pytest.mark.parametrize("change", [{"positional_embedding_type": "head_rotary"}, {"n_heads": 8}, {"qk_norm": True}])
def test_pre_trained_weights_keep_the_architecture_that_they_were_trained_with(
    change: dict[str, object], tmp_path: Path
) -> None:
    own = json.loads((resolve("asset:lm_rotary", "backbone.path") / "config.json").read_text())
    file, (key,) = tmp_path / "model.json", change
    config = replace(ExperimentConfig(), backbone=BackboneConfig("asset:lm_rotary", str(file)))
    file.write_text(json.dumps(own | {"seq_len": 1024}))
    pretrained_backbone(config)
    file.write_text(json.dumps(own | change))
    with pytest.raises(ValueError, match=f"backbone.config='{file}': expected null or one with {key}={own[key]}, with"):
        pretrained_backbone(config)


def test_a_config_of_another_program_beside_the_weights_is_ignored_where_the_architecture_is_named(
    tmp_path: Path,
) -> None:
    shutil.copyfile(resolve("asset:lm_rotary", "backbone.path") / "model.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"another": "program"}')
    file = str(tmp_path / "model.safetensors")
    pretrained_backbone(replace(ExperimentConfig(), backbone=BackboneConfig(file, "demo_7m")))
    with pytest.raises(ValueError, match="another"):
        pretrained_backbone(replace(ExperimentConfig(), backbone=BackboneConfig(file)))


def test_a_transformers_folder_is_both_weights_and_architecture(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, width in (("one", 16), ("other", 32)):
        config = transformers.GPT2Config(n_embd=width, n_layer=1, n_head=2, n_positions=512, vocab_size=64)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    one, other = (str(tmp_path / name) for name in ("one", "other"))
    for backbone, message in (
        (BackboneConfig(one, other), "backbone.config='.*other': expected null or .*one, whose weights are loaded"),
        (BackboneConfig(one, seq_len=9000), "backbone.seq_len=9000: expected null, a transformers backbone"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrained_backbone(replace(ExperimentConfig(), backbone=backbone))
    data = replace(ExperimentConfig().data, length=64)
    assert pretrained_backbone(replace(ExperimentConfig(), data=data, backbone=BackboneConfig(one, one))).config


def test_muon_trains_the_matrices_of_any_architecture_or_is_refused() -> None:
    names = ("body.layers.0.attention.weight", "decoder.blocks.0.ffn.weight", "encoder.layer.3.up.weight")
    named = [(name, nn.Parameter(torch.ones(2, 2))) for name in names]
    rows = ("tok_embeddings.text", nn.Parameter(torch.ones(2, 2)))
    optimizer = muon([*named, rows], OptimConfig())
    by_rule = {rule: sum(len(g["params"]) for g in optimizer.param_groups if g["rule"] == rule) for rule in RULES}
    assert by_rule == {"muon": 3, "adamw": 1}
    with pytest.raises(ValueError, match=r"optim\.name=muon: expected adamw"):
        muon([rows], OptimConfig())


def test_rows_without_a_loss_are_counted_as_frozen_by_a_dry_run() -> None:
    config = load_experiment(EXPERIMENTS / "uncond_pretrained.yaml", "demo", ["loss_rows=image"])
    trainable = sum(p.numel() for p in plan(config).model.parameters() if p.requires_grad)
    built = build_model(config).module
    assert trainable == sum(p.numel() for p in built.parameters() if p.requires_grad)

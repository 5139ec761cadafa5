"""Backbones of transformers: its own logits before expansion, and every operation on a backbone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_lm.export import main as export
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.freeze import FREEZE_GROUPS, freeze, group_members, tune_only
from t2i_lm.models.fsdp import blocks_of
from t2i_lm.models.generate import generate
from t2i_lm.models.huggingface_folder import empty_huggingface, is_huggingface, load_huggingface
from t2i_lm.storage.run_folder import read_run, run_folders
from t2i_lm.train import main

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": SIZES | {"intermediate_size": 64, "num_key_value_heads": 1},
    "Qwen2": SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "GPTNeoX": SIZES | {"intermediate_size": 64},
    "GPT2": {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    | {"bos_token_id": 0, "eos_token_id": 0},
    "Olmo2": SIZES | {"intermediate_size": 64, "pad_token_id": 1},
}
IDS_BT = torch.arange(24).view(2, 12) * 5


def folder_of(kind: str, root: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**KINDS[kind]))
    model.save_pretrained(root / kind)
    return root / kind


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return folder_of(request.param, tmp_path)


def test_logits_equal_transformers_and_expansion_leaves_old_rows_unchanged(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = model(IDS_BT).logits
    backbone = load_huggingface(folder).eval()
    assert is_huggingface(folder)
    assert torch.allclose(backbone(IDS_BT), expected, atol=1e-5 * expected.abs().max().item())
    text, output = backbone.tok_embeddings.text.clone(), backbone.output.text.clone()
    expand_vocabulary(backbone, 30, torch.Generator().manual_seed(1))
    assert torch.equal(backbone.tok_embeddings.text, text)
    assert torch.equal(backbone.output.text, output)
    grown = backbone(IDS_BT)
    assert grown.shape[-1] == 512 + 7 + 30
    assert torch.allclose(grown[..., :512], expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("group", FREEZE_GROUPS)
def test_a_frozen_group_is_unchanged(group: str, folder: Path) -> None:
    backbone = load_huggingface(folder)
    expand_vocabulary(backbone, 30, torch.Generator().manual_seed(1))
    members = group_members(backbone, group)
    assert bool(members) == (group != "position" or "GPT2" in str(folder))
    before = {name: parameter.clone() for name, parameter in backbone.named_parameters()}
    freeze(backbone, [group])
    trainable = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.5)
    ids_BT = torch.cat([IDS_BT, IDS_BT % 37 + 512], dim=1)
    backbone.loss(ids_BT[:, :-1], ids_BT[:, 1:]).total.backward()
    optimizer.step()
    frozen = {id(parameter) for parameter in members.values()}
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) in frozen), name


def test_every_parameter_is_in_a_group(folder: Path) -> None:
    backbone = load_huggingface(folder)
    covered = {id(p) for group in FREEZE_GROUPS for p in group_members(backbone, group).values()}
    assert covered == {id(parameter) for parameter in backbone.parameters()}
    tune_only(backbone, "first_half")
    assert any(not parameter.requires_grad for parameter in backbone.parameters())


def test_greedy_ids_with_a_cache_equal_full_recomputation(folder: Path) -> None:
    backbone = load_huggingface(folder).eval()
    vocab = expand_vocabulary(backbone, 30, torch.Generator().manual_seed(1))
    prompts = [torch.tensor([3, 5, 7]), torch.tensor([9, 2, 4, 8])]
    for prompt, codes in zip(prompts, generate(backbone, vocab, prompts, 6), strict=True):
        ids = prompt
        for code in codes:
            logits = backbone(ids[None])[0, -1, vocab.image_offset :]
            assert int(code) == int(logits.argmax())
            ids = torch.cat([ids, code[None] + vocab.image_offset])


def test_generation_uses_compiled_blocks(folder: Path) -> None:
    backbone = load_huggingface(folder)
    assert not backbone.generates_compiled
    for block in blocks_of(backbone):
        block.compile()  # at its first call
    assert backbone.generates_compiled


def test_a_random_arm_depends_on_its_seed_alone(folder: Path) -> None:
    pretrained = load_huggingface(folder).state_dict()

    def initialized(seed: int) -> dict[str, torch.Tensor]:
        backbone = empty_huggingface(folder)
        backbone.reset_parameters(torch.Generator().manual_seed(seed))
        return backbone.state_dict()

    first, again, other = initialized(0), initialized(0), initialized(1)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        constant = bool((tensor == tensor.flatten()[0]).all())  # norms and biases
        assert torch.equal(tensor, other[name]) == constant, name
        assert torch.equal(tensor, pretrained[name]) == constant, name


@pytest.mark.slow
def test_a_run_from_pretrained_to_an_export_that_transformers_loads(tiny: list[str], tmp_path: Path) -> None:
    folder = folder_of("Llama", tmp_path)
    overrides = [*tiny, f"backbone.path={folder}", f"run.dir={tmp_path}/runs"]
    assert main([str(ROOT / "experiments" / "t2i_pretrained.yaml"), *overrides]) == 0
    run = read_run(run_folders(tmp_path / "runs")[-1])
    assert run.report is not None
    assert run.validations()[-1]["val"]["image"]["nll"] < run.validations()[0]["val"]["image"]["nll"]
    assert export([str(run.folder), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert json.loads((tmp_path / "out" / "card.json").read_text())["rows"] == 512 + 7 + 32
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    state = torch.load(sorted((run.folder / "checkpoints").glob("*.ckpt"))[-1], weights_only=True)["state_dict"]
    assert torch.equal(again.lm_head.weight[-32:], state["decoder.output.image"])
    assert main([str(ROOT / "experiments" / "t2i_scratch.yaml"), *overrides, "samples.prompts=0"]) == 0


def test_packing_is_refused_before_data_preparation(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"backbone.path={folder_of('Llama', tmp_path)}", f"data.cache_dir={tmp_path}/cache"]
    assert main([str(ROOT / "experiments" / "t2i_pretrained.yaml"), *tiny, *overrides, "trainer.packing=true"]) == 2
    assert "trainer.packing=True: expected false, a transformers backbone cannot be packed" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_too_many_positions_and_damaged_folders_are_named(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of("Llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 50}))
    experiment = str(ROOT / "experiments" / "t2i_pretrained.yaml")
    assert main([experiment, *tiny, f"backbone.path={folder}", f"run.dir={tmp_path}/runs"]) == 2
    assert "data.length=112: the backbone has 50 positions" in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read by transformers"):
        load_huggingface(folder)

"""LoRA (extra `lora`): trainable parameters, zero initialization, merging into plain files."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_lm.analysis.base import NotAvailableError
from t2i_lm.analysis.similarity import weight_distances
from t2i_lm.experiment.export import export
from t2i_lm.experiment.restore import load_trained
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.freeze import freeze, group_table
from t2i_lm.models.generate import generate
from t2i_lm.models.huggingface import HuggingFaceDecoder
from t2i_lm.models.image_adapters import is_restricted, restrict_adapters
from t2i_lm.models.lora import add_adapters, coverage, merge_adapters
from t2i_lm.models.open_lm import decoder_config, load_open_lm
from t2i_lm.storage.run_folder import find_run
from t2i_lm.tokenizers.joint_vocab import JointVocab
from t2i_lm.train import main

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


def make_decoder() -> Decoder:
    sizes = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 16, "vocab_size": 50}
    decoder = Decoder(decoder_config({**sizes, "positional_embedding_type": "rotary"}))
    decoder.reset_parameters(torch.Generator().manual_seed(1))
    expand_vocabulary(decoder, 8, torch.Generator().manual_seed(2))
    return decoder


def test_adapters_start_at_zero_and_only_they_and_new_rows_are_trainable() -> None:
    decoder, ids_BT = make_decoder(), torch.arange(10)[None]
    before, state = decoder(ids_BT), torch.get_rng_state()
    add_adapters(decoder, 2, 4.0, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(decoder(ids_BT), before)
    trainable = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    rows = {f"{matrix}.{block}" for matrix in ("tok_embeddings", "output") for block in ("special", "image")}
    assert {name for name in trainable if ".lora_" not in name} == rows
    assert len(trainable) == 4 + 2 * 4 * 2  # 4 blocks of rows; 2 layers x 4 linear layers x 2 factors
    again = make_decoder()
    add_adapters(again, 2, 4.0, torch.Generator().manual_seed(3))
    assert all(torch.equal(one, two) for one, two in zip(decoder.parameters(), again.parameters(), strict=True))


def test_a_frozen_layer_gets_no_adapter() -> None:
    decoder = make_decoder()
    freeze(decoder, ["attention"])
    add_adapters(decoder, 2, 4.0, torch.Generator())
    assert not any("attention" in name for name, _ in decoder.named_parameters() if ".lora_" in name)
    frozen = make_decoder()
    freeze(frozen, ["attention", "ffn"])
    with pytest.raises(ValueError, match=r"lora\.rank=2: every linear layer is frozen"):
        add_adapters(frozen, 2, 4.0, torch.Generator())


def test_merging_restores_the_plain_model_with_the_same_function() -> None:
    decoder, ids_BT = make_decoder(), torch.arange(10)[None]
    names = set(decoder.state_dict())
    add_adapters(decoder, 2, 4.0, torch.Generator())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
        before = decoder(ids_BT)
        merge_adapters(decoder)
        assert set(decoder.state_dict()) == names
        assert torch.allclose(decoder(ids_BT), before, atol=1e-5)


def test_a_run_with_adapters_trains_reloads_and_exports_plain_weights(tiny: list[str], tmp_path: Path) -> None:
    experiment = str(ROOT / "experiments" / "remedies" / "lora.yaml")
    quick = ["samples.prompts=0", "samples.preference_scenes=0", "trainer.max_steps=4", "lora.rank=2"]
    assert main([experiment, *tiny, *quick, f"run.dir={tmp_path}"]) == 0
    run = find_run(tmp_path)
    trained = load_trained(run).module.decoder
    export(run, tmp_path / "out", "float32")
    plain = load_open_lm(tmp_path / "out", tmp_path / "out" / "config.json").eval()
    ids_BT = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(plain(ids_BT), trained(ids_BT), atol=1e-5)
    assert "lora" in (run / "config.yaml").read_text()


SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 1}
SIZES |= {"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "num_experts_per_tok": 2}
EXPERTS = SIZES | {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 4}
# Architecture, and the shares of the weights of its blocks that have an adapter and that have none.
HELD: dict[str, tuple[dict[str, Any], float, str]] = {
    "Llama": (EXPERTS, 1.0, ""),
    "GPT2": (
        {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
        1.0,
        "",
    ),
    "Mixtral": (EXPERTS, 0.995, "; none on body.layers.*.mlp.gate.weight (256)"),
    "GptOss": (EXPERTS, 0.995, "; none on body.layers.*.mlp.router.weight (256)"),
    "JetMoe": (EXPERTS | {"kv_channels": 16}, 1.0, ""),
}


def backbone_of(kind: str) -> HuggingFaceDecoder:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**HELD[kind][0])
    backbone = HuggingFaceDecoder(transformers.AutoModelForCausalLM.from_config(config))
    expand_vocabulary(backbone, 8, torch.Generator().manual_seed(2))
    return backbone.eval()


@pytest.mark.parametrize("kind", HELD)
def test_experts_and_transposed_layers_get_adapters_that_merge_exactly(kind: str) -> None:
    backbone, ids_BT = backbone_of(kind), torch.arange(20).view(2, 10)
    names, before = set(backbone.state_dict()), backbone(ids_BT)
    assert coverage(backbone) is None
    add_adapters(backbone, 2, 4.0, torch.Generator().manual_seed(3))
    assert torch.equal(backbone(ids_BT), before)
    said = coverage(backbone)
    assert said is not None
    assert said.startswith(f"adapters: on {HELD[kind][1]:.1%} of the ")
    assert said.endswith(HELD[kind][2] or "in the matrices of the blocks")
    assert said in group_table(backbone)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
    backbone.loss(ids_BT[:, :-1], ids_BT[:, 1:]).total.backward()
    assert all(parameter.grad is not None for name, parameter in backbone.named_parameters() if ".lora_" in name)
    with torch.no_grad():
        adapted = backbone(ids_BT)
        assert not torch.allclose(adapted, before, atol=1e-3)
        merge_adapters(backbone)
        assert set(backbone.state_dict()) == names
        assert torch.allclose(backbone(ids_BT), adapted, atol=1e-5)


def test_lora_is_refused_where_most_weights_would_get_no_adapter() -> None:
    backbone = backbone_of("Llama")
    for block in backbone.body.layers:
        block.mlp.table = torch.nn.Parameter(torch.zeros(32, 500))
    message = r"lora\.rank=2: only 3\d\.\d% of the trainable weights .* none of body\.layers\.\*\.mlp\.table \(32,000\)"
    with pytest.raises(ValueError, match=message):
        add_adapters(backbone, 2, 4.0, torch.Generator())
    for block in backbone.body.layers:
        block.mlp.table.requires_grad_(False)
    add_adapters(backbone, 2, 4.0, torch.Generator())


def test_a_state_from_before_experts_had_adapters_is_read() -> None:
    earlier, now = backbone_of("Mixtral"), backbone_of("Mixtral")
    linear = [name for name, part in earlier.named_modules() if isinstance(part, torch.nn.Linear)]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=4.0, target_modules=linear), earlier)
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.01)
    add_adapters(now, 2, 4.0, torch.Generator())
    now.load_state_dict(earlier.state_dict())
    ids_BT = torch.arange(20).view(2, 10)
    assert torch.equal(now(ids_BT), earlier(ids_BT))
    lacking = {name: value for name, value in earlier.state_dict().items() if ".lora_" not in name}
    with pytest.raises(RuntimeError, match="lora_A"):
        now.load_state_dict(lacking)


START, CODES = 54, torch.arange(57, 65)  # of the eight image codes behind 50 text rows and seven special ones


def restricted(model: Any, rank: int = 2) -> Any:
    """With adapters away from zero, on image positions alone."""
    add_adapters(model, rank, 4.0, torch.Generator().manual_seed(3))
    restrict_adapters(model, START)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    return model.eval()


def test_adapters_on_images_leave_text_equal_to_the_bit() -> None:
    decoder, plain, everywhere = restricted(make_decoder()), make_decoder().eval(), make_decoder()
    text_BT, mixed_BT = torch.arange(10)[None], torch.cat([torch.arange(6), torch.tensor([START]), CODES])[None]
    add_adapters(everywhere, 2, 4.0, torch.Generator())
    everywhere.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        assert torch.equal(decoder(text_BT), plain(text_BT))
        assert torch.equal(decoder(mixed_BT)[:, :6], plain(mixed_BT)[:, :6])
        assert not torch.allclose(decoder(mixed_BT)[:, 6:], plain(mixed_BT)[:, 6:], atol=1e-3)
        assert torch.equal(decoder(CODES[None]), everywhere(CODES[None]))
        assert not torch.equal(decoder(mixed_BT), everywhere(mixed_BT))
    assert is_restricted(decoder)
    assert not is_restricted(everywhere)


def test_their_weights_are_not_compared_with_those_of_another_model() -> None:
    with pytest.raises(NotAvailableError, match=r"lora\.image_only"):
        weight_distances(make_decoder(), restricted(make_decoder()))


def test_adapters_on_images_require_a_cache() -> None:
    config = transformers.OpenAIGPTConfig(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    backbone = HuggingFaceDecoder(transformers.AutoModelForCausalLM.from_config(config))
    expand_vocabulary(backbone, 8, torch.Generator().manual_seed(2))
    with pytest.raises(ValueError, match=r"^lora\.image_only=True: expected false, a layer .* 3\) positions for 1 ids"):
        restricted(backbone)
    restricted(backbone_of("GPT2"))


def test_adapters_on_images_hold_in_packed_cached_and_recomputed_passes_and_in_copies() -> None:
    decoder, plain = restricted(make_decoder()), restricted(make_decoder())
    prompt = torch.cat([torch.arange(6), torch.tensor([START])])
    codes_N = generate(decoder, JointVocab(50, 8), [prompt], 4)[0]
    with torch.no_grad():
        logits = plain(torch.cat([prompt, codes_N + 57])[None, :-1])[0, -4:, 57:]
    assert torch.equal(logits.argmax(-1), codes_N)
    ids_BT = torch.stack([torch.cat([prompt, CODES]), torch.arange(15)])
    mask_BT = torch.ones(2, 14, dtype=torch.bool)
    mask_BT[1, 5:] = False
    expected = plain.loss(ids_BT[:, :-1], ids_BT[:, 1:], plain.target_index(mask_BT)).total
    expected.backward()
    copied = copy.deepcopy(decoder)
    copied(torch.zeros(1, 3, dtype=torch.int64))  # has a gate of its own
    decoder.enable_packing()
    decoder.enable_activation_checkpointing()
    found = decoder.train().loss(ids_BT[:, :-1], ids_BT[:, 1:], decoder.target_index(mask_BT)).total
    copied(torch.zeros(1, 3, dtype=torch.int64))
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, mine), other in zip(decoder.named_parameters(), plain.parameters(), strict=True):
        if mine.grad is not None:
            assert torch.allclose(mine.grad, other.grad, atol=1e-5), name


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_adapters_on_images_of_models_of_transformers(kind: str) -> None:
    backbone, plain = restricted(backbone_of(kind)), backbone_of(kind)
    text_BT, images_BT = torch.arange(20).view(2, 10), 60 + 7 + torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(backbone(text_BT), plain(text_BT))
        assert not torch.allclose(backbone(images_BT), plain(images_BT), atol=1e-3)


def test_adapters_on_images_are_refused_for_routed_experts() -> None:
    backbone = backbone_of("Mixtral")
    add_adapters(backbone, 2, 4.0, torch.Generator())
    with pytest.raises(ValueError, match=r"lora\.image_only=True: expected false, body.*experts holds routed experts"):
        restrict_adapters(backbone, START)

"""Every parameter has one kind, by the structure of its modules, in architectures with different mechanisms."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.freeze import FREEZE_GROUPS, freeze, group_members, group_table, tune_only
from t2i_lm.models.parameter_kinds import KINDS, parameter_places
from t2i_lm.models.token_rows import Embedding, Output
from tests.decoders import tiny_decoder

transformers = pytest.importorskip("transformers")
VOCAB, POSITIONS = 160, 96
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": POSITIONS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
ONE_HEAD = SIZES | {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
OPT = SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
LINEAR = {f"linear_{name}": size for name, size in (("num_value_heads", 2), ("num_key_heads", 2))}
LINEAR |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}


class Around(Backbone):
    """A causal model of transformers as `HuggingFaceDecoder` holds it, of any architecture and on the meta device."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        self.body, rows = model.base_model, model.get_input_embeddings()
        positions = getattr(config, "max_position_embeddings", POSITIONS)
        self.config: Any = SimpleNamespace(n_layers=config.num_hidden_layers, seq_len=positions)
        self.tok_embeddings, self.output = Embedding(*rows.weight.shape), Output(*rows.weight.shape)
        self.tok_embeddings.text, self.output.text = rows.weight, model.get_output_embeddings().weight
        self.body.set_input_embeddings(nn.Module())


def built(kind: str, **sizes: Any) -> Around:
    return Around(getattr(transformers, f"{kind}Config")(**sizes))


def kinds(backbone: Backbone) -> dict[str, str | None]:
    return {place.name: place.kind for place in parameter_places(backbone)}


# Names by which each architecture tells kinds apart: of norms, and of what mixes positions; the rest of a block is ffn.
MECHANISMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "DeepseekV3": (
        ONE_HEAD
        | EXPERTS
        | LATENT
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        "*norm.*",
        "*.self_attn.*",
    ),
    "Falcon": (
        SIZES | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2, "alibi": False, "num_kv_heads": 1},
        "*.ln_*",
        "*.self_attention.*",
    ),
    "GptOss": (ONE_HEAD | EXPERTS | {"num_local_experts": 4}, "*norm.*", "*.self_attn.*"),
    "GPTNeo": (
        SIZES | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        "*.ln_*",
        "*.attn.*",
    ),
    "Bloom": (GPT2 | {"hidden_size": 32}, "*norm.* *.ln_f.*", "*.self_attention.*"),
    "Cohere": (ONE_HEAD | {"use_qk_norm": True}, "*norm.*", "*.self_attn.*"),
    "Qwen3Moe": (ONE_HEAD | EXPERTS | {"num_experts": 4}, "*norm.*", "*.self_attn.*"),
    "JetMoe": (ONE_HEAD | {"num_local_experts": 4, "kv_channels": 16}, "*norm.*", "*.self_attention.*"),
    "Lfm2": (ONE_HEAD | {"layer_types": ["conv", "full_attention"]}, "*norm.*", "*.[cs][oe][nl][vf]*"),
    "Qwen3Next": (
        ONE_HEAD | EXPERTS | LINEAR | {"num_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
        "*norm.*",
        "*_attn.*",
    ),
    "Bamba": (ONE_HEAD | SSM | {"attn_layer_indices": [1]}, "*norm.*", "*.[ms][ae][ml][bf]*"),
    "FalconH1": (ONE_HEAD | SSM | {"mamba_d_ssm": 64}, "*norm.*", "*.[ms][ae][ml][bf]*"),
    "Mamba": (SIZES | {"state_size": 8}, "*norm*", "*.mixer.*"),
    "RecurrentGemma": (ONE_HEAD | {"num_hidden_layers": 3, "lru_width": 32}, "*norm.*", "*.temporal_block.*"),
}


@pytest.mark.parametrize("kind", MECHANISMS)
def test_every_parameter_of_a_block_has_the_kind_of_its_mechanism(kind: str) -> None:
    sizes, norm, attention = MECHANISMS[kind]
    backbone = built(kind, **sizes)
    found = kinds(backbone)
    assert set(found) == {name for name, _ in backbone.named_parameters(remove_duplicate=False)}
    for name, own in found.items():
        if any(fnmatchcase(name, glob) for glob in norm.split()):
            assert own == "norm", name
        elif name.startswith(("tok_embeddings", "output")):
            assert own == name.removeprefix("tok_").removesuffix("s.text").removesuffix(".text"), name
        elif "wpe" in name:
            assert own == "position"
        else:
            assert own == ("attention" if fnmatchcase(name, attention) else "ffn"), name
    assert {"attention", "norm", "embedding", "output"} <= set(found.values())
    assert ("ffn" in found.values()) == (kind != "Mamba")


# What the groups were when they were chosen by name, in architectures whose names that knew.
BY_NAME = {
    "embedding": ("tok_embeddings.*",),
    "output": ("output.*",),
    "norm": ("*norm.*", "*.ln_?.*"),
    "attention": (
        *("*.attention.in_proj.*", "*.attention.out_proj.*", "*.self_attn.*_proj.*"),
        *("*.attention.query_key_value.*", "*.attention.dense.*", "*.attn.c_*"),
    ),
    "ffn": ("*.feed_forward.*", "*.mlp.*", "*.fc?.*"),
    "position": ("*.wpe.*", "*.embed_positions.*"),
    "first_half": ("*layers.0.*", "*.h.0.*"),
    "second_half": ("*layers.1.*", "*.h.1.*"),
    "text_rows": ("*.text",),
    "image_rows": ("*.image",),
}


def named_backbones() -> Iterator[tuple[str, Backbone]]:
    for positional in ("rotary", "head_rotary"):
        for ffn_type in ("swiglu", "gelu", "gemma_geglu"):
            yield f"open_lm {positional} {ffn_type}", tiny_decoder(positional, qk_norm=True, ffn_type=ffn_type)
    yield "Llama", built("Llama", **ONE_HEAD)
    yield "Qwen2", built("Qwen2", **ONE_HEAD)
    yield "GPT2", built("GPT2", **GPT2)
    yield "GPTNeoX", built("GPTNeoX", **SIZES, intermediate_size=64)
    yield "OPT", built("OPT", **OPT)
    yield "Olmo2", built("Olmo2", **ONE_HEAD)


def test_groups_hold_what_they_held_by_name() -> None:
    for label, backbone in named_backbones():
        names = [name for name, _ in backbone.named_parameters(remove_duplicate=False)]
        for group, globs in BY_NAME.items():
            expected = [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
            assert list(group_members(backbone, group)) == expected, (label, group)
        in_one = [sum(name in group_members(backbone, group) for group in KINDS) for name in names]
        assert set(in_one) == {1}, label


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_names_of_modules_decide_nothing(data: st.DataObject) -> None:
    kind, sizes = data.draw(
        st.sampled_from([("Llama", ONE_HEAD), ("GPT2", GPT2), ("GptOss", MECHANISMS["GptOss"][0]), ("OPT", OPT)])
    )
    backbone = built(kind, **sizes)
    before = [(place.kind, place.half) for place in parameter_places(backbone)]
    name = st.text("abcxyz_", min_size=1, max_size=3).filter(lambda name: not name.isdigit())
    for module in list(backbone.body.modules()):
        children = [*module._modules.values()]
        names = data.draw(st.lists(name, min_size=len(children), max_size=len(children), unique=True))
        module._modules = dict(zip(names, children, strict=True))
    assert [(place.kind, place.half) for place in parameter_places(backbone)] == before


def test_projections_of_a_factorized_embedding_belong_to_the_rows() -> None:
    found = kinds(built("OPT", **OPT | {"word_embed_proj_dim": 16}))
    assert found["body.decoder.project_in.weight"] == "embedding"
    assert found["body.decoder.project_out.weight"] == "output"
    assert found["body.decoder.embed_positions.weight"] == "position"


def test_halves_follow_the_list_of_blocks_under_any_name() -> None:
    backbone = built("GPTNeo", **MECHANISMS["GPTNeo"][0])
    assert all(".h.0." in name for name in group_members(backbone, "first_half"))
    assert all(".h.1." in name for name in group_members(backbone, "second_half"))


def test_a_parameter_without_a_kind_makes_its_groups_refuse_by_name() -> None:
    backbone = built("Llama", **ONE_HEAD)
    block = backbone.body.layers[0]
    block.residual_gain = nn.Parameter(torch.ones(32))
    for group in ("attention", "ffn", "norm"):
        with pytest.raises(ValueError, match=rf"group {group}: .*whether body\.layers\.0\.residual_gain belongs to it"):
            freeze(backbone, [group])
    with pytest.raises(ValueError, match=r"residual_gain.*groups that are known: embedding, output, first_half"):
        tune_only(backbone, "norm")
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert "body.layers.0.residual_gain" in group_members(backbone, "first_half")
    assert "cannot be frozen or tuned: 1 tensors" in group_table(backbone)
    freeze(backbone, ["second_half"])


def test_lists_of_blocks_without_an_order_have_kinds_but_no_halves() -> None:
    backbone = built("Llama", **ONE_HEAD)
    before = [place.kind for place in parameter_places(backbone)]
    backbone.body.layers, blocks = nn.Module(), list(backbone.body.layers)
    backbone.body.layers.low, backbone.body.layers.high = nn.ModuleList(blocks[:1]), nn.ModuleList(blocks[1:])
    assert [place.kind for place in parameter_places(backbone)] == before
    for half in ("first_half", "second_half"):
        with pytest.raises(ValueError, match=rf"group {half}: .*body\.layers\.low\.0\.self_attn"):
            group_members(backbone, half)


def test_blocks_that_are_not_found_leave_only_the_rows_known() -> None:
    backbone = built("Llama", **ONE_HEAD)
    backbone.body.tower = built("Qwen2", **ONE_HEAD).body.layers  # as many as n_layers, of another class
    for group in FREEZE_GROUPS:
        if group in ("text_rows", "image_rows"):
            group_members(backbone, group)
        else:
            with pytest.raises(ValueError, match=r"body\.layers\.0\.self_attn\.q_proj\.weight"):
                group_members(backbone, group)


def test_a_block_shared_by_both_halves_is_in_neither() -> None:
    backbone = built("Llama", **ONE_HEAD)
    backbone.body.layers[1].mlp = backbone.body.layers[0].mlp
    with pytest.raises(ValueError, match=r"group first_half: .*body\.layers\.0\.mlp\.gate_proj\.weight and 2 more"):
        group_members(backbone, "first_half")
    assert len(group_members(backbone, "ffn")) == 6

"""FLOP counts of mixtures of experts against counts by hand; a dense model counts every parameter."""

from typing import Any

import pytest
import torch
from torch import nn

from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.experts import expert_weights
from t2i_lm.models.flops import flop_per_token, formula, product_parameters
from t2i_lm.models.huggingface import HuggingFaceDecoder

transformers = pytest.importorskip("transformers")


def empty(kind: str, **sizes: Any) -> HuggingFaceDecoder:
    with torch.device("meta"):
        config = getattr(transformers, f"{kind}Config")(**sizes)
        return HuggingFaceDecoder(transformers.AutoModelForCausalLM.from_config(config))


def test_mixtral_8x7b_counts_two_of_eight_experts() -> None:
    backbone = empty("Mixtral", max_position_embeddings=4096)
    D, F, V = 4096, 14336, 32000
    layer = 2 * D * D + 2 * D * 1024 + 8 * D + 2 * (3 * D * F) + 2 * D  # attention, router, two experts, norms
    assert product_parameters(backbone) == 32 * layer + D + V * D
    assert product_parameters(backbone) + V * D == pytest.approx(12.9e9, rel=0.005)  # as published
    assert flop_per_token(backbone, 100) == 6 * (32 * layer + D + V * D) + 12 * 32 * D * 100
    assert "(N counts 2 of 8 experts)" in formula(backbone, 100, None)


def test_qwen3_30b_counts_eight_of_128_experts() -> None:
    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    more = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128}
    backbone = empty("Qwen3Moe", vocab_size=151936, **sizes, **more)
    D, K, V = 2048, 128, 151936
    layer = 2 * D * 32 * K + 2 * D * 4 * K + 2 * K + 128 * D + 8 * (3 * D * 768) + 2 * D
    assert product_parameters(backbone) == 48 * layer + D + V * D
    assert product_parameters(backbone) + V * D == pytest.approx(3.35e9, rel=0.005)  # "A3B"


def test_deepseek_v3_counts_eight_routed_experts_the_shared_one_and_dense_layers() -> None:
    backbone = empty("DeepseekV3", num_hidden_layers=5)
    D, V, H, E = 7168, 129280, 128, 256
    attention = D * 1536 + 1536 + 1536 * H * 192 + D * 576 + 512 + 512 * H * 256 + H * 128 * D + 2 * D
    dense, expert = 3 * D * 18432, 3 * D * 2048
    router = E * D + sum(name.endswith("bias") for name, _ in backbone.named_parameters() if ".4." in name) * E
    assert product_parameters(backbone) == 5 * attention + 3 * dense + 2 * (router + 9 * expert) + D + V * D


def test_new_rows_count_and_dense_models_are_unchanged() -> None:
    backbone = empty("Llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    expand_vocabulary(backbone, 8, torch.Generator())
    every = sum(parameter.numel() for parameter in backbone.parameters())
    assert product_parameters(backbone) == every - 65 * 32
    assert expert_weights(backbone) == []
    assert "experts" not in formula(backbone, 8, None)


def test_experts_whose_number_per_token_is_unknown_all_count_and_the_line_says_so() -> None:
    class TinyExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(4, 8, 32))

    backbone = empty("Llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    before = product_parameters(backbone)
    backbone.body.layers[0].mlp.experts = TinyExperts()
    assert product_parameters(backbone) == before + 4 * 8 * 32
    assert "all 4 experts, since their number per token is unknown" in formula(backbone, 8, None)
    backbone.body.layers[0].mlp.top_k = 1
    assert product_parameters(backbone) == before + 8 * 32

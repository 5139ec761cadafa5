"""Attention weights and distances, against the layer's own output and against attention that is known."""

import pytest
import torch

from t2i_lm.analysis.attention import SHARE, attention_of_sequences, attention_weights, uniform_attention
from t2i_lm.analysis.base import NotAvailableError
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.decoder import Attention
from t2i_lm.models.huggingface import HuggingFaceDecoder
from t2i_lm.tokenizers.layout import BOUNDARY, IMAGE, PAD, TEXT
from tests.decoders import tiny_decoder

MODALITY = torch.tensor([[BOUNDARY, TEXT, TEXT, BOUNDARY, IMAGE, IMAGE, PAD]])


@pytest.mark.parametrize("positional", ["rotary", "llama_rotary", "head_rotary"])
def test_weights_times_values_are_the_layers_output(positional: str) -> None:
    decoder = tiny_decoder(positional, qk_norm=True).eval()
    outputs = []
    for block in decoder.layers:
        block.attention.register_forward_hook(lambda module, args, output: outputs.append((module, args[0], output)))
    ids_BT = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    found = attention_weights(decoder, ids_BT)
    assert len(found) == len(outputs) == 2
    for weights_BHTT, (module, x_BTD, output_BTD) in zip(found, outputs, strict=True):
        assert isinstance(module, Attention)
        values_BHTK = module.in_proj(x_BTD)[..., 64:].view(2, 9, 2, 16).transpose(1, 2)
        again_BTD = module.out_proj((weights_BHTT @ values_BHTK).transpose(1, 2).flatten(2))
        assert torch.allclose(again_BTD, output_BTD, atol=1e-5)
        assert torch.allclose(weights_BHTT.sum(-1), torch.ones(2, 2, 9))
        assert not weights_BHTT.triu(1).any()


def test_uniform_causal_attention_has_its_distances() -> None:
    decoder = tiny_decoder().eval()
    for block in decoder.layers:
        torch.nn.init.zeros_(block.attention.in_proj.weight)
    (weights_BHTT, _) = attention_weights(decoder, torch.zeros(1, 7, dtype=torch.long))
    found = attention_of_sequences(weights_BHTT, MODALITY)
    # A query at position p sees p + 1 keys at a mean distance of p / 2; two of them are text from position 2 on.
    expected = {"text": (0.5 + 1.0) / 2, "image": (2.0 + 2.5) / 2, SHARE: (2 / 5 + 2 / 6) / 2}
    for name, value in expected.items():
        assert found[name].tolist() == [[pytest.approx(value, rel=1e-5)] * 2]
        assert uniform_attention(MODALITY)[name] == pytest.approx(value, rel=1e-5)


def test_attention_to_one_key_has_its_distance_and_sequences_without_queries_have_none() -> None:
    weights_BHTT = torch.zeros(2, 1, 7, 7)
    weights_BHTT[..., 1] = 1  # the first token of the caption
    found = attention_of_sequences(weights_BHTT, torch.cat([MODALITY, torch.full_like(MODALITY, TEXT)]))
    assert found["image"][0].item() == pytest.approx((3 + 4) / 2)
    assert found[SHARE][0].item() == 1
    assert found["image"][1].isnan().all()


def test_a_model_of_transformers_gives_its_own_weights_and_keeps_its_attention() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ids_BT = torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model.eval()(ids_BT, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    decoder = HuggingFaceDecoder(model).eval()
    found = attention_weights(decoder, ids_BT)
    assert len(found) == 2
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))
    assert decoder.hf_config._attn_implementation == "sdpa"


def test_other_backbones_are_named() -> None:
    class Other(Backbone):
        pass

    with pytest.raises(NotAvailableError, match="Other does not give its attention weights"):
        attention_weights(Other(), torch.zeros(1, 2, dtype=torch.long))

"""Decoders written as architectures of transformers: every supported combination computes the same logits."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_lm.models.decoder import FEED_FORWARDS, NORMS, Decoder
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.huggingface import HuggingFaceDecoder
from t2i_lm.models.open_lm import decoder_config
from t2i_lm.models.transformers_export import (
    ARCHITECTURES,
    as_written,
    require_equal_logits,
    require_equivalent,
    save_transformers,
)

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

TINY = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 24, "vocab_size": 50}
MORE: tuple[dict[str, Any], ...] = ({}, {"weight_tying": True}, {"post_embed_norm": True, "weight_tying": True})
SUPPORTED = [
    {"positional_embedding_type": positions, "model_norm": norm, "ffn_type": ffn, "qk_norm": qk_norm, **more}
    for positions in ("rotary", "llama_rotary")
    for norm, ffn, qk_norm in ARCHITECTURES
    for more in (MORE if ffn != "swiglu_torch" else ({},))
]


def random_decoder(**values: Any) -> Decoder:
    """All tensors random, norms too, so that a lost or swapped one is noticed; expanded by 7 + 20 rows."""
    decoder = Decoder(decoder_config(TINY | values))
    draw = torch.Generator().manual_seed(0)
    decoder.reset_parameters(draw)
    expand_vocabulary(decoder, 20, draw)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=draw))
    return decoder.eval()


@pytest.mark.parametrize("values", SUPPORTED, ids=lambda values: "-".join(str(value) for value in values.values()))
def test_logits_equal_the_decoders(values: dict[str, Any], tmp_path: Path) -> None:
    decoder = random_decoder(**values)
    save_transformers(decoder, tmp_path, torch.float32, {"text_rows": 50})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids_BT = torch.arange(48).view(2, 24) * 11 % 77
    with torch.no_grad():
        expected_BTV, logits_BTV = decoder(ids_BT), model(ids_BT).logits
    assert logits_BTV.shape == (2, 24, 77)
    assert (logits_BTV - expected_BTV).abs().max() <= 1e-5 * expected_BTV.abs().max()
    assert (model.config.vocab_size, model.config.text_rows) == (77, 50)
    tied = values.get("weight_tying", False) and not values.get("post_embed_norm", False)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_bfloat16_rounds_the_weights_alone(tmp_path: Path) -> None:
    decoder = random_decoder(positional_embedding_type="llama_rotary", model_norm="rms_norm", post_embed_norm=True)
    written = save_transformers(decoder, tmp_path, torch.bfloat16, {})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight.float(), written.output.matrix())
    assert not torch.equal(written.output.matrix(), decoder.output.matrix())


def test_a_backbone_of_transformers_is_written_as_its_own_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16}
    ends = {"bos_token_id": 1, "eos_token_id": 2}  # of the base
    config = transformers.Qwen3Config(vocab_size=50, max_position_embeddings=24, **sizes, **ends)
    backbone = HuggingFaceDecoder(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    expand_vocabulary(backbone, 20, torch.Generator().manual_seed(0))
    written = save_transformers(
        backbone, tmp_path, torch.bfloat16, {"image_offset": 57, "eos_token_id": 51, "pad_token_id": 56}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (type(model).__name__, model.config.image_offset) == ("Qwen3ForCausalLM", 57)
    for read in (model.config, model.generation_config):
        assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (1, 51, 56)
    ids_BT = torch.arange(40).view(2, 20) * 11 % 77
    with torch.no_grad():
        assert torch.allclose(model(ids_BT).logits, written(ids_BT), atol=1e-6)


UNSUPPORTED = [
    ({"positional_embedding_type": "head_rotary"}, "positional_embedding_type='head_rotary' is position-free"),
    ({"positional_embedding_type": "none"}, "supported: rotary, llama_rotary"),
    ({"qk_norm": True}, "qk_norm=True over all heads together with model_norm='default_layer_norm'"),
    ({"qk_norm": True, "model_norm": "rms_norm", "ffn_type": "gelu"}, "supported with qk_norm: model_norm=rms_norm"),
    (
        {"ffn_type": "gemma_geglu"},
        "ffn_type='gemma_geglu' with model_norm='default_layer_norm'.*: swiglu,",
    ),
]


@pytest.mark.parametrize(("values", "message"), UNSUPPORTED)
def test_decoders_without_an_equivalent_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    decoder = random_decoder(**{"positional_embedding_type": "rotary"} | values)
    with pytest.raises(ValueError, match=message):
        save_transformers(decoder, tmp_path, torch.float32, {})
    assert not list(tmp_path.iterdir())


def test_every_combination_is_written_or_refused() -> None:
    for norm, ffn, qk_norm in itertools.product(NORMS, FEED_FORWARDS, (False, True)):
        more = {"positional_embedding_type": "rotary", "model_norm": norm, "ffn_type": ffn, "qk_norm": qk_norm}
        if (norm, ffn, qk_norm) in ARCHITECTURES:
            require_equivalent(decoder_config(TINY | more))
        else:
            with pytest.raises(ValueError, match="--format transformers: no architecture has"):
                require_equivalent(decoder_config(TINY | more))


@pytest.mark.parametrize("change", ["theta", "weight"])
def test_a_folder_that_computes_other_logits_is_an_error(change: str, tmp_path: Path) -> None:
    decoder = random_decoder(positional_embedding_type="rotary", model_norm="rms_norm")
    save_transformers(decoder, tmp_path, torch.float32, {})
    written = as_written(decoder, torch.float32)
    require_equal_logits(written, tmp_path)
    if change == "theta":
        config = json.loads((tmp_path / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 20_000.0
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        with torch.no_grad():
            written.output.text[3] *= 1.001
    with pytest.raises(RuntimeError, match="the export is wrong"):
        require_equal_logits(written, tmp_path)

"""An open_lm decoder as the `transformers` architecture that computes the same logits.

`rotary` positions rotate halves of a head, as Llama does; `llama_rotary` rotates neighboring entries, so the rows of
each head's query and key projections are reordered. `post_embed_norm` is folded into the embedding rows. LayerNorms
without a bias get one of zeros.

Shapes: `B` batch, `T` tokens, `D` width, `K` head dim, `V` vocabulary.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.decoder import ROTARY, ROTARY_BASE, Block, Decoder, DecoderConfig, GemmaGeGLU, RMSNorm, SwiGLU
from t2i_lm.models.huggingface import HuggingFaceDecoder, require_transformers
from t2i_lm.models.huggingface_folder import save_huggingface
from t2i_lm.storage.writing import write_atomic, writing

# The option that asks for an export, for errors.
FORMAT = "--format transformers"
# Largest difference of logits from the decoder's, relative to their maximum.
TOLERANCE = 1e-5
# Positions of the sequences on which logits are compared.
COMPARED = 64
# Keys by which `generate` begins, ends and pads.
GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")
EPS = 1e-5  # of every norm in the decoder
LAYER_NORMS = ("default_layer_norm", "lp_layer_norm", "gain_only_layer_norm", "gain_only_lp_layer_norm")
SWIGLU = ("swiglu", "swiglu_torch")

_LLAMA = ("Llama", {"rms_norm_eps": EPS})
_OLMOE = {"rms_norm_eps": EPS, "num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": False}
_STABLELM = ("StableLm", {"layer_norm_eps": EPS})
_STARCODER2 = ("Starcoder2", {"norm_epsilon": EPS, "hidden_act": "gelu", "use_bias": False})
# (model_norm, ffn_type, qk_norm) -> class prefix and config keys. Query-key norms over the whole width, before pre-norm
# blocks, exist only in OLMoE, which with one expert is a dense model: OLMo2 is post-norm, Qwen3 normalizes each head.
ARCHITECTURES: dict[tuple[str, str, bool], tuple[str, dict[str, Any]]] = {
    **{("rms_norm", ffn, False): _LLAMA for ffn in SWIGLU},
    ("rms_norm", "gemma_geglu", False): ("Llama", {"rms_norm_eps": EPS, "hidden_act": "gelu", "mlp_bias": True}),
    ("rms_norm", "gelu", False): ("Arcee", {"rms_norm_eps": EPS, "hidden_act": "gelu"}),
    **{("rms_norm", ffn, True): ("Olmoe", _OLMOE) for ffn in SWIGLU},
    **{(norm, ffn, False): _STABLELM for norm in LAYER_NORMS for ffn in SWIGLU},
    **{(norm, "gelu", False): _STARCODER2 for norm in (*LAYER_NORMS, "no_wb_layer_norm")},
    **{("no_wb_layer_norm", ffn, False): ("Olmo", {}) for ffn in SWIGLU},
}


def require_equivalent(config: DecoderConfig) -> None:
    """Checks that a `transformers` architecture computes the decoder's function.

    Raises:
        ValueError: naming the key without an equivalent, and the supported values.
    """
    positions, norm = config.positional_embedding_type, config.model_norm
    if positions not in ROTARY:
        raise ValueError(
            f"{FORMAT}: positional_embedding_type={positions!r} is position-free, and the architectures "
            f"of transformers that match otherwise have rotary positions; supported: {', '.join(ROTARY)}"
        )
    if (norm, config.ffn_type, config.qk_norm) in ARCHITECTURES:
        return
    if config.qk_norm:
        supported = "model_norm=rms_norm with ffn_type=swiglu"
        raise ValueError(
            f"{FORMAT}: no architecture has qk_norm=True over all heads together with model_norm={norm!r} "
            f"and ffn_type={config.ffn_type!r}; supported with qk_norm: {supported}"
        )
    supported = ", ".join(name for own, name, qk_norm in ARCHITECTURES if own == norm and not qk_norm)
    raise ValueError(
        f"{FORMAT}: no architecture has ffn_type={config.ffn_type!r} with model_norm={norm!r}; "
        f"supported with this norm: {supported}"
    )


def save_transformers(decoder: Backbone, folder: Path, dtype: torch.dtype, keys: Mapping[str, Any]) -> Backbone:
    """Writes a folder for `AutoModelForCausalLM.from_pretrained`, reads it back and compares logits.

    Args:
        decoder: expanded or not, without adapters.
        folder: exists and is empty.
        dtype: of the written weights.
        keys: more keys for `config.json`; ids of `GENERATION` for `generation_config.json` too, which `generate` and
            `documents.py` read.

    Returns:
        The decoder with the written weights, in float32.

    Raises:
        ValueError: if no architecture is equivalent, or transformers is not installed.
        RuntimeError: if the folder computes other logits.
    """
    library = require_transformers(FORMAT)
    written = as_written(decoder, dtype)
    if isinstance(decoder, HuggingFaceDecoder):
        save_huggingface(decoder, folder, dtype)
    else:
        assert isinstance(written, Decoder)
        model = library.AutoModelForCausalLM.from_config(transformers_config(written), dtype=torch.float32)
        model.load_state_dict(transformers_state(written))
        with writing(folder):
            model.to(dtype).save_pretrained(folder)
    _add_keys(folder / "config.json", keys)
    if ids := {key: keys[key] for key in GENERATION if key in keys}:
        _add_keys(folder / "generation_config.json", ids)
    require_equal_logits(written, folder)
    return written


def _add_keys(file: Path, keys: Mapping[str, Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    write_atomic(file, json.dumps(content | dict(keys), indent=2) + "\n")


@torch.no_grad()
def as_written(decoder: Backbone, dtype: torch.dtype) -> Backbone:
    """A copy in evaluation mode with the embedding norm folded and all weights rounded to `dtype`, in float32."""
    own = copy.deepcopy(decoder).eval()
    if isinstance(own, Decoder) and own.config.post_embed_norm:
        if own.config.weight_tying:  # the output rows stay as they are
            own.output = copy.deepcopy(own.output)
        for name in own.tok_embeddings.BLOCKS:
            rows = getattr(own.tok_embeddings, name)
            if rows is not None:
                setattr(own.tok_embeddings, name, nn.Parameter(own.post_embed_norm(rows)))
        own.post_embed_norm = nn.Identity()
        own.config = replace(own.config, post_embed_norm=False, weight_tying=False)
    for parameter in own.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return own


def transformers_config(decoder: Decoder) -> Any:
    """The config object of the equivalent architecture, its vocabulary all rows of the decoder.

    Raises:
        ValueError: if there is none.
    """
    own = decoder.config
    require_equivalent(own)
    name, options = ARCHITECTURES[own.model_norm, own.ffn_type, own.qk_norm]
    block = decoder.layers[0]
    assert isinstance(block, Block)
    *_, down = block.feed_forward.children()
    assert isinstance(down, nn.Linear)
    rope = {"rope_type": "default", "rope_theta": ROTARY_BASE, "partial_rotary_factor": 1.0}
    return getattr(require_transformers(FORMAT), f"{name}Config")(
        vocab_size=len(decoder.tok_embeddings.matrix()),
        hidden_size=own.hidden_dim,
        intermediate_size=down.in_features,
        num_hidden_layers=own.n_layers,
        num_attention_heads=own.n_heads,
        num_key_value_heads=own.n_heads,
        max_position_embeddings=own.seq_len,
        rope_parameters=rope,
        tie_word_embeddings=own.weight_tying,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **options,
    )


def transformers_state(decoder: Decoder) -> dict[str, Tensor]:
    """Weights under the names of the equivalent architecture."""
    architecture, _ = ARCHITECTURES[decoder.config.model_norm, decoder.config.ffn_type, decoder.config.qk_norm]
    state = {
        "model.embed_tokens.weight": decoder.tok_embeddings.matrix(),
        "lm_head.weight": decoder.output.matrix(),
        **_norm("model.norm", decoder.norm, architecture),
    }
    for number, block in enumerate(decoder.layers):
        assert isinstance(block, Block)
        state |= _block(f"model.layers.{number}", block, decoder.config, architecture)
    return {name: tensor.detach() for name, tensor in state.items()}


def _block(prefix: str, block: Block, config: DecoderConfig, architecture: str) -> dict[str, Tensor]:
    attention, feed_forward = block.attention, block.feed_forward
    query_DD, key_DD, value_DD = attention.in_proj.weight.chunk(3)
    order_D = _half_rotation_order(config)
    state = {
        f"{prefix}.self_attn.q_proj.weight": query_DD[order_D],
        f"{prefix}.self_attn.k_proj.weight": key_DD[order_D],
        f"{prefix}.self_attn.v_proj.weight": value_DD,
        f"{prefix}.self_attn.o_proj.weight": attention.out_proj.weight,
        **_norm(f"{prefix}.input_layernorm", block.attention_norm, architecture),
        **_norm(f"{prefix}.post_attention_layernorm", block.ffn_norm, architecture),
    }
    if config.qk_norm:
        for name, norm in (("q_norm", attention.q_norm), ("k_norm", attention.k_norm)):
            assert isinstance(norm, RMSNorm)
            state[f"{prefix}.self_attn.{name}.weight"] = norm.weight[order_D]
    if architecture == "Olmoe":
        assert isinstance(feed_forward, SwiGLU)
        state[f"{prefix}.mlp.gate.weight"] = torch.zeros(1, config.hidden_dim)  # of one expert, whose share is 1
        state[f"{prefix}.mlp.experts.gate_up_proj"] = feed_forward.w12.weight[None]
        state[f"{prefix}.mlp.experts.down_proj"] = feed_forward.w3.weight[None]
    elif isinstance(feed_forward, SwiGLU):
        gate_FD, up_FD = feed_forward.w12.weight.chunk(2)
        state[f"{prefix}.mlp.gate_proj.weight"], state[f"{prefix}.mlp.up_proj.weight"] = gate_FD, up_FD
        state[f"{prefix}.mlp.down_proj.weight"] = feed_forward.w3.weight
    elif isinstance(feed_forward, GemmaGeGLU):
        state |= {f"{prefix}.mlp.{name}": tensor for name, tensor in feed_forward.named_parameters()}
    else:
        first, last = ("c_fc", "c_proj") if architecture == "Starcoder2" else ("up_proj", "down_proj")
        up_FD, down_DF = feed_forward.parameters()
        state[f"{prefix}.mlp.{first}.weight"], state[f"{prefix}.mlp.{last}.weight"] = up_FD, down_DF
    return state


def _norm(prefix: str, norm: nn.Module, architecture: str) -> dict[str, Tensor]:
    """A norm's tensors, those that the architecture has and the decoder lacks at their neutral values."""
    if architecture == "Olmo":
        return {}
    if not isinstance(norm, nn.LayerNorm):
        return {f"{prefix}.weight": norm.weight}  # type: ignore[dict-item]
    weight = torch.ones(norm.normalized_shape) if norm.weight is None else norm.weight
    return {f"{prefix}.weight": weight, f"{prefix}.bias": torch.zeros_like(weight) if norm.bias is None else norm.bias}


def _half_rotation_order(config: DecoderConfig) -> Tensor:
    """Row of the decoder's query or key projection for each row of one that rotates halves, (D,)."""
    order_D = torch.arange(config.hidden_dim)
    if config.positional_embedding_type != "llama_rotary":
        return order_D
    return order_D.view(config.n_heads, -1, 2).transpose(1, 2).flatten()


@torch.no_grad()
def require_equal_logits(decoder: Backbone, folder: Path) -> None:
    """Reads a folder with `transformers` and compares its logits on random ids with the decoder's.

    Raises:
        RuntimeError: if they differ by more than `TOLERANCE` of the largest, or a tensor is missing.
    """
    model, info = require_transformers(FORMAT).AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    rows = len(decoder.tok_embeddings.matrix())
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(rows, (2, min(COMPARED, decoder.config.seq_len)), generator=draw)
    expected_BTV = decoder(ids_BT)
    logits_BTV = model.eval()(ids_BT).logits
    if logits_BTV.shape == expected_BTV.shape and not info["missing_keys"]:
        difference = float((logits_BTV - expected_BTV).abs().max() / expected_BTV.abs().max())
        if difference <= TOLERANCE:
            return
        fault = f"logits that differ by {difference:.1e} of the largest, more than {TOLERANCE}"
    else:
        missing = ", ".join(sorted(info["missing_keys"])) or "none"
        fault = f"logits {tuple(logits_BTV.shape)} for {tuple(expected_BTV.shape)}; missing tensors: {missing}"
    raise RuntimeError(f"transformers {require_transformers(FORMAT).__version__} computes {fault}: the export is wrong")

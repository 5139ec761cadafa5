"""Decoders of other projects with our decoder's weights, so that all compute the same function.

The architecture is what all of them support: RMSNorm, rotary positions, SwiGLU, no biases, untied rows. Each peer
maps open_lm's parameter names and layouts, which are ours, to its own; weights are copied and gradients compared
through that map.

Shapes: `B` batch, `T` tokens, `D` width, `V` vocabulary.
"""

import copy
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_lm.models.decoder import Decoder, DecoderConfig, swiglu_width
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.open_lm import open_lm_state_dict
from t2i_lm.tokenizers.joint_vocab import JointVocab

Tensors = dict[str, Tensor]
NORM_EPS = 1e-5  # of our RMSNorm


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder and of one batch."""

    width: int
    layers: int
    heads: int
    text_vocab: int
    image_codes: int
    batch: int
    length: int


SHAPES = {
    "tiny": Shape(32, 2, 2, text_vocab=64, image_codes=32, batch=2, length=24),
    "demo": Shape(256, 6, 4, text_vocab=4096, image_codes=512, batch=16, length=112),
    # The paper's: 1.5B parameters; 14 sequences are the share of one of 64 GPUs in a batch of 1M tokens.
    "paper": Shape(2048, 24, 16, text_vocab=50_432, image_codes=16_384, batch=14, length=1152),
}


@dataclass
class Peer:
    """Another project's decoder.

    Attributes:
        name: of the project.
        model: with our weights after `copy_weights`.
        rename: tensors in open_lm's names and layouts -> in the model's.
        logits: ids (B, T) -> logits (B, T, V) float32.
    """

    name: str
    model: Any
    rename: Callable[[Tensors], Tensors]
    logits: Callable[[Tensor], Tensor]


def build_decoder(shape: Shape, device: str) -> tuple[Decoder, JointVocab]:
    """Our decoder, expanded by image rows as for training, from a fixed seed."""
    with torch.device(device):
        decoder = Decoder(
            DecoderConfig(
                hidden_dim=shape.width,
                n_layers=shape.layers,
                n_heads=shape.heads,
                seq_len=shape.length,
                vocab_size=shape.text_vocab,
                positional_embedding_type="rotary",
                model_norm="rms_norm",
            )
        )
    generator = torch.Generator(device).manual_seed(0)
    decoder.reset_parameters(generator)
    return decoder, expand_vocabulary(decoder, shape.image_codes, generator)


def compiled_by_block(decoder: Decoder, **settings: Any) -> Decoder:
    """A copy that shares the parameters, each block compiled as by `trainer.compile` with torch.compile's settings."""
    own = copy.copy(decoder)
    own._modules = {**decoder._modules, "layers": nn.ModuleList(copy.copy(block) for block in decoder.layers)}
    for block in own.layers:
        block.compile(**settings)
    return own


def copy_weights(decoder: Decoder, peer: Peer) -> None:
    """Copies our weights to the peer; parameters must correspond one to one."""
    renamed = peer.rename(open_lm_state_dict(decoder))
    parameters = dict(peer.model.named_parameters())
    if renamed.keys() != parameters.keys():
        raise ValueError(f"{peer.name} has other parameters: {sorted(renamed.keys() ^ parameters.keys())[0]}")
    for name, parameter in parameters.items():
        parameter.data.copy_(renamed[name])


def gradients(decoder: Decoder) -> Tensors:
    """Our gradients by open_lm's names, row blocks joined."""
    named = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    for matrix in ("tok_embeddings", "output"):
        blocks = [named.pop(f"{matrix}.{block}") for block in decoder.output.BLOCKS]
        named[f"{matrix}.weight"] = torch.cat([block for block in blocks if block is not None])
    return {name: gradient for name, gradient in named.items() if gradient is not None}


def _rename(tensors: Tensors, table: dict[str, tuple[str, ...]]) -> Tensors:
    """Renames by suffix; a tensor with several target names is split among them."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        prefix, layer = "", name
        if name.startswith("layers."):
            _, number, layer = name.split(".", 2)
            prefix = f"{table['layers'][0]}.{number}."
        ends = table[layer]
        renamed |= {prefix + end: part for end, part in zip(ends, tensor.chunk(len(ends)), strict=True)}
    return renamed


_LLAMA = {
    "layers": ("model.layers",),
    "attention.in_proj.weight": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    "attention.out_proj.weight": ("self_attn.o_proj.weight",),
    "feed_forward.w12.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "feed_forward.w3.weight": ("mlp.down_proj.weight",),
    "attention_norm.weight": ("input_layernorm.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "norm.weight": ("model.norm.weight",),
    "tok_embeddings.weight": ("model.embed_tokens.weight",),
    "output.weight": ("lm_head.weight",),
}
_LITGPT = {
    "layers": ("transformer.h",),
    "attention.in_proj.weight": ("attn.qkv.weight",),
    "attention.out_proj.weight": ("attn.proj.weight",),
    "feed_forward.w12.weight": ("mlp.fc_1.weight", "mlp.fc_2.weight"),
    "feed_forward.w3.weight": ("mlp.proj.weight",),
    "attention_norm.weight": ("norm_1.weight",),
    "ffn_norm.weight": ("norm_2.weight",),
    "norm.weight": ("transformer.ln_f.weight",),
    "tok_embeddings.weight": ("transformer.wte.weight",),
    "output.weight": ("lm_head.weight",),
}


def build_llama(shape: Shape, vocab: JointVocab, device: str) -> Peer:
    """Transformers' LlamaForCausalLM with its default attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.width,
        head_dim=shape.width // shape.heads,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=swiglu_width(shape.width),
        vocab_size=vocab.size,
        max_position_embeddings=shape.length,
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,  # no id ends generation early
        pad_token_id=None,  # the embedding would skip this row's gradient
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return Peer(
        "transformers",
        model,
        lambda tensors: _rename(tensors, _LLAMA),
        lambda ids_BT: model(input_ids=ids_BT, use_cache=False).logits.float(),
    )


def build_litgpt(shape: Shape, vocab: JointVocab, device: str) -> Peer | None:
    """LitGPT's GPT; None if it is not installed."""
    if importlib.util.find_spec("litgpt") is None:
        return None
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        name="benchmark",
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        block_size=shape.length,
        vocab_size=vocab.size,
        padded_vocab_size=vocab.size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=NORM_EPS,
        mlp_class_name="LLaMAMLP",
        intermediate_size=swiglu_width(shape.width),
    )
    with torch.device(device):
        model = GPT(config)
    return Peer("litgpt", model, lambda tensors: _rename(tensors, _LITGPT), lambda ids_BT: model(ids_BT).float())


def build_open_lm(shape: Shape, vocab: JointVocab, device: str, checkout: Path) -> Peer:
    """open_lm's own model.py, from a checkout of mlfoundations/open_lm at commit 9bb92ef.

    Raises:
        ValueError: if the folder is not a checkout.
    """
    if not (checkout / "open_lm" / "model.py").is_file():
        raise ValueError(f"--open-lm {checkout}: no open_lm/model.py in it")
    if "xformers" not in sys.modules and importlib.util.find_spec("xformers") is None:
        # Upstream imports it even with torch's attention and SwiGLU, as chosen here.
        package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
        stubs = {"SwiGLU": nn.Identity, "LowerTriangularMask": None, "memory_efficient_attention": None}
        for name, stub in stubs.items():
            setattr(ops, name, stub)
        package.ops = ops  # type: ignore[attr-defined]
        sys.modules |= {"xformers": package, "xformers.ops": ops}
    sys.path.insert(0, str(checkout))
    from open_lm.attention import torch_attn
    from open_lm.model import Params, Transformer
    from open_lm.norms import get_norm_class

    with torch.device(device):
        model = Transformer(
            Params(
                dim=shape.width,
                n_layers=shape.layers,
                n_heads=shape.heads,
                seq_len=shape.length,
                vocab_size=vocab.size,
                post_embed_norm=False,
                weight_tying=False,
                norm_type=get_norm_class("rms_norm"),
                attn_func=torch_attn,
                apply_qk_norm=False,
                positional_embedding_type="rotary",
                ffn_type="swiglu_torch",
            )
        )
    return Peer("open_lm", model, lambda tensors: tensors, lambda ids_BT: model(ids_BT)[0])

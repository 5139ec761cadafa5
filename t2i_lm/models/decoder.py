"""An open_lm-compatible decoder (mlfoundations/open_lm at commit 9bb92ef), in one file.

Attribute names are open_lm's, so state dicts map name by name (`models/open_lm.py`). Two things differ in
form, not in value: token rows are kept in blocks, and the loss is computed inside the output module's forward
(`token_rows.py`).

Shapes: `B` batch, `T` tokens, `D` width, `H` heads, `K` head dim, `F` feed-forward width, `V` vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.cache import KVCache, Window
from t2i_lm.models.feed_forward import FEED_FORWARDS, fan_in_normal_
from t2i_lm.models.token_rows import Embedding, Output

POSITIONS = ("rotary", "llama_rotary", "head_rotary", "none")
ROTARY = ("rotary", "llama_rotary")
ROTARY_BASE = 10_000.0
SHORT = 512  # positions up to which `attend` may hold all scores
Rotary = tuple[Tensor, Tensor] | None  # cosines and sines that broadcast to (B, H, T, K)


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in float32, as open_lm's `rms_norm`."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x_float = x.float()
        normed = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


# open_lm's low-precision (`lp_`) norms differ only in the dtype under autocast, which torch's own autocast
# rules decide here; in float32 they are the same function.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "default_layer_norm": nn.LayerNorm,
    "lp_layer_norm": nn.LayerNorm,
    "gain_only_layer_norm": lambda dim: nn.LayerNorm(dim, bias=False),
    "gain_only_lp_layer_norm": lambda dim: nn.LayerNorm(dim, bias=False),
    "no_wb_layer_norm": lambda dim: nn.LayerNorm(dim, elementwise_affine=False),
    "rms_norm": RMSNorm,
}


@dataclass(frozen=True)
class DecoderConfig:
    """open_lm's model JSON, with its key names."""

    hidden_dim: int
    n_layers: int
    n_heads: int
    seq_len: int
    vocab_size: int
    positional_embedding_type: str
    model_norm: str = "default_layer_norm"
    qk_norm: bool = False
    post_embed_norm: bool = False
    weight_tying: bool = False
    ffn_type: str = "swiglu"

    def __post_init__(self) -> None:
        for key in ("hidden_dim", "n_layers", "n_heads", "seq_len", "vocab_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.hidden_dim % self.n_heads or (self.hidden_dim // self.n_heads) % 2:
            raise ValueError(f"hidden_dim={self.hidden_dim} must be an even multiple of n_heads={self.n_heads}")
        allowed = {
            "positional_embedding_type": POSITIONS,
            "model_norm": tuple(NORMS),
            "ffn_type": tuple(FEED_FORWARDS),
        }
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise ValueError(f"{key}={getattr(self, key)!r}: expected one of {', '.join(values)}")


def rotary_table(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (seq_len, K) of each entry's angle."""
    head_dim = config.hidden_dim // config.n_heads
    inv_freq = 1.0 / (ROTARY_BASE ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angles = torch.outer(torch.arange(config.seq_len).float(), inv_freq)
    pairs = config.positional_embedding_type == "llama_rotary"
    angles = angles.repeat_interleave(2, dim=-1) if pairs else torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def turn_halves(x: Tensor) -> Tensor:
    """A quarter turn of the pairs (x_i, x_{i+K/2}), which `rotary` rotates."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def turn_neighbours(x: Tensor) -> Tensor:
    """A quarter turn of the pairs (x_2i, x_2i+1), which `llama_rotary` rotates."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention.

    Torch's bfloat16 flash kernel for CPUs is slow at short sequences (5 times slower than plain products at
    104 positions, 1.5 times at 320), so these take plain products. Of one position it is slow, too: compiled sums,
    which read keys and values once, make a whole step an eighth shorter.
    """
    B, H, T, K = q_BHTK.shape
    if q_BHTK.is_cpu and T == 1 and torch.compiler.is_compiling():
        scores_BHT1 = (q_BHTK * k_BHTK).sum(-1, keepdim=True) / math.sqrt(K)
        if mask is not None:
            scores_BHT1 = scores_BHT1.masked_fill(~mask.transpose(2, 3), float("-inf"))
        return (scores_BHT1.softmax(2) * v_BHTK).sum(2, keepdim=True)
    if q_BHTK.is_cpu and q_BHTK.dtype == torch.bfloat16 and causal and T <= SHORT:
        mask_TT = torch.full((T, T), float("-inf"), dtype=q_BHTK.dtype).triu(1)
        q_XTK, k_XTK, v_XTK = (x.reshape(B * H, T, K) for x in (q_BHTK, k_BHTK, v_BHTK))
        scores_XTT = torch.baddbmm(mask_TT, q_XTK, k_XTK.transpose(1, 2), alpha=1 / math.sqrt(K))
        return (scores_XTT.softmax(dim=-1) @ v_XTK).view(B, H, T, K)
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=mask, is_causal=causal)


class Attention(nn.Module):
    """Causal multi-head attention with a fused query-key-value projection."""

    def __init__(self, layer: int, config: DecoderConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.layer, self.n_heads = layer, config.n_heads
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        norm = NORMS[config.model_norm] if config.qk_norm else lambda _: nn.Identity()
        self.q_norm, self.k_norm = norm(dim), norm(dim)
        self.turn = turn_neighbours if config.positional_embedding_type == "llama_rotary" else turn_halves

    def forward(self, x_BTD: Tensor, rotary: Rotary, store: KVCache | Window | None) -> Tensor:
        B, T, D = x_BTD.shape
        q_BTD, k_BTD, v_BTD = self.in_proj(x_BTD).chunk(3, dim=-1)
        heads = (B, T, self.n_heads, D // self.n_heads)
        q_BHTK = self.q_norm(q_BTD).view(heads).transpose(1, 2)
        k_BHTK = self.k_norm(k_BTD).view(heads).transpose(1, 2)
        v_BHTK = v_BTD.view(heads).transpose(1, 2)
        if rotary is not None:
            cos, sin = rotary
            q_BHTK = (q_BHTK * cos + self.turn(q_BHTK) * sin).to(v_BHTK.dtype)
            k_BHTK = (k_BHTK * cos + self.turn(k_BHTK) * sin).to(v_BHTK.dtype)
        mask = None
        if store is not None:
            k_BHTK, v_BHTK, mask = store.extend(self.layer, k_BHTK, v_BHTK)
        out_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, causal=T > 1, mask=mask)
        return self.out_proj(out_BHTK.transpose(1, 2).reshape(B, T, D))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, layer: int, config: DecoderConfig) -> None:
        super().__init__()
        self.attention = Attention(layer, config)
        self.feed_forward = FEED_FORWARDS[config.ffn_type](config.hidden_dim)
        self.attention_norm = NORMS[config.model_norm](config.hidden_dim)
        self.ffn_norm = NORMS[config.model_norm](config.hidden_dim)

    def forward(self, x_BTD: Tensor, rotary: Rotary, store: KVCache | Window | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, store)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))  # type: ignore[no-any-return]


class Decoder(Backbone):
    """The language model; weights are uninitialised until `reset_parameters` or a load.

    `rotary` and `llama_rotary` positions are RoPE on different pairs of entries. `head_rotary`, which the
    released open_lm-1b uses, rotates queries and keys of one head by the same angle at every position and so
    leaves their products unchanged: the model is position-free, and it is implemented as the identity that it
    is. `none` is the same function.
    """

    config: DecoderConfig
    ragged_cache = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config, self._checkpointing = config, False
        self._compiled_step: Callable[[Tensor, Window, bool], Tensor] | None = None
        self.tok_embeddings = Embedding(config.vocab_size, config.hidden_dim)
        embed_norm = NORMS[config.model_norm] if config.post_embed_norm else lambda _: nn.Identity()
        self.post_embed_norm = embed_norm(config.hidden_dim)
        self.layers = nn.ModuleList(Block(layer, config) for layer in range(config.n_layers))
        self.norm = NORMS[config.model_norm](config.hidden_dim)
        self.output = Output(config.vocab_size, config.hidden_dim)
        if config.weight_tying:
            self.output.text = self.tok_embeddings.text
        if config.positional_embedding_type in ROTARY:
            cos_TK, sin_TK = rotary_table(config)
            self.register_buffer("rotary_cos", cos_TK, persistent=False)
            self.register_buffer("rotary_sin", sin_TK, persistent=False)

    def rotary(self, length: int) -> Rotary:
        """Cosines and sines (T, K) of the first positions, or None for a position-free model.

        Raises:
            ValueError: if they run past `seq_len`.
        """
        if self.config.positional_embedding_type not in ROTARY:
            return None
        self._require_positions(length)
        return self.get_buffer("rotary_cos")[:length], self.get_buffer("rotary_sin")[:length]

    def _require_positions(self, length: int) -> None:
        if self.config.positional_embedding_type in ROTARY and length > self.config.seq_len:
            raise ValueError(f"position {length} is past the decoder's seq_len={self.config.seq_len}")

    def hidden(self, ids_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final normalised hidden states (B, T, D); an empty cache keeps the keys and values."""
        x_BTD = self.post_embed_norm(self.tok_embeddings(ids_BT))
        rotary = self.rotary(ids_BT.shape[1])
        for block in self.layers:
            if cache is not None:
                x_BTD = block.forward(x_BTD, rotary, cache)  # past `torch.compile`, whose graphs are of training
            elif self._checkpointing and self.training:
                x_BTD = checkpoint(block, x_BTD, rotary, None, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotary, None)
        if cache is not None:
            cache.prefilled(ids_BT.shape[1])
        return self.norm(x_BTD)  # type: ignore[no-any-return]

    def next_hidden(self, ids_B: Tensor, cache: KVCache, image_rows_only: bool = False) -> Tensor:
        """Final normalised hidden states (B, D) of one more position."""
        step = self._compiled_step or self._step
        return step(ids_B, cache.next_window(), image_rows_only)

    def _step(self, ids_B: Tensor, window: Window, image_rows_only: bool) -> Tensor:
        x_B1D = self.post_embed_norm(self.tok_embeddings(ids_B[:, None], image_rows_only))
        rotary: Rotary = None
        if self.config.positional_embedding_type in ROTARY:
            cos_B11K = self.get_buffer("rotary_cos")[window.position_B][:, None, None]
            rotary = cos_B11K, self.get_buffer("rotary_sin")[window.position_B][:, None, None]
        for block in self.layers:
            x_B1D = block.forward(x_B1D, rotary, window)
        return self.norm(x_B1D)[:, 0]  # type: ignore[no-any-return]

    def compile_steps(self) -> None:
        """Compiles `next_hidden`: some seconds at the first pictures, then less time a token."""
        self._compiled_step = torch.compile(self._step)

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each block in the backward pass."""
        self._checkpointing = True

    def new_cache(self, batch: int, length: int) -> KVCache:
        """A static cache on the decoder's device.

        Raises:
            ValueError: if a decoder with positions has fewer.
        """
        self._require_positions(length)
        config = self.config
        head_dim = config.hidden_dim // config.n_heads
        return KVCache(config.n_layers, batch, config.n_heads, length, head_dim, self.output.text)

    @torch.no_grad()
    def reset_parameters(self, generator: Generator) -> None:
        """open_lm's initialisation: truncated normals of std 1/sqrt(fan-in), output projections scaled by depth."""
        for depth, block in enumerate(self.layers, start=1):
            assert isinstance(block, Block)
            fan_in_normal_(block.attention.in_proj.weight, generator)
            fan_in_normal_(block.attention.out_proj.weight, generator, depth)
            block.feed_forward.reset_parameters(depth, generator)
        fan_in_normal_(self.output.text, generator)
        if not self.config.weight_tying:
            fan_in_normal_(self.tok_embeddings.text, generator)

"""Causal self-attention of open_lm's decoder, and its positions.

Shapes: `B` batch, `T` tokens, `D` width, `H` heads, `K` head dim.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from t2i_lm.models.cache import KVCache, Window
from t2i_lm.models.packing import Packed

POSITIONS = ("rotary", "llama_rotary", "head_rotary", "none")
ROTARY = ("rotary", "llama_rotary")
ROTARY_BASE = 10_000.0
SHORT = 512  # positions up to which `attend` may hold all scores
HALF = (torch.float16, torch.bfloat16)
Rotary = tuple[Tensor, Tensor] | None  # cosines and sines that broadcast to (B, H, T, K)


def rotary_table(positions: str, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, K) of each entry's angle."""
    inv_freq = 1.0 / (ROTARY_BASE ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angles = torch.outer(torch.arange(length).float(), inv_freq)
    pairs = positions == "llama_rotary"
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
    """Scaled dot-product attention; the mask is added to scores.

    Torch's bfloat16 flash kernel for CPUs is slow at short sequences (5 times slower than plain products at
    104 positions, 1.5 times at 320), so these take plain products. Of one position it is slow, too: compiled sums,
    which read keys and values once, make a whole step an eighth shorter.
    """
    B, H, T, K = q_BHTK.shape
    if q_BHTK.is_cpu and T == 1 and torch.compiler.is_compiling():
        scores_BHT1 = (q_BHTK * k_BHTK).sum(-1, keepdim=True) / math.sqrt(K)
        if mask is not None:
            scores_BHT1 = scores_BHT1 + mask.transpose(2, 3)
        return (scores_BHT1.softmax(2) * v_BHTK).sum(2, keepdim=True)
    if q_BHTK.is_cpu and q_BHTK.dtype == torch.bfloat16 and causal and T <= SHORT:
        mask_TT = torch.full((T, T), float("-inf"), dtype=q_BHTK.dtype).triu(1)
        q_XTK, k_XTK, v_XTK = (x.reshape(B * H, T, K) for x in (q_BHTK, k_BHTK, v_BHTK))
        scores_XTT = torch.baddbmm(mask_TT, q_XTK, k_XTK.transpose(1, 2), alpha=1 / math.sqrt(K))
        return (scores_XTT.softmax(dim=-1) @ v_XTK).view(B, H, T, K)
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=mask, is_causal=causal)


def attend_packed(q_1HNK: Tensor, k_1HNK: Tensor, v_1HNK: Tensor, packed: Packed) -> Tensor:
    """Causal attention within each of the packed sequences.

    A kernel that starts again at every sequence exists for half precision on GPUs; elsewhere queries, keys and values
    are padded once more, a small part of the whole work.
    """
    if q_1HNK.is_cuda and v_1HNK.dtype in HALF and q_1HNK.shape[-1] % 8 == 0:
        q_NHK, k_NHK, v_NHK = (x[0].transpose(0, 1).to(v_1HNK.dtype) for x in (q_1HNK, k_1HNK, v_1HNK))
        ends_S, T = packed.ends_S, packed.shape[1]
        out_NHK = varlen_attn(q_NHK, k_NHK, v_NHK, ends_S, ends_S, T, T, window_size=(-1, 0))
        assert isinstance(out_NHK, Tensor)
        return out_NHK.transpose(0, 1)[None]
    out_BHTK = attend(packed.pad(q_1HNK), packed.pad(k_1HNK), packed.pad(v_1HNK), causal=True)
    return packed.unpad(out_BHTK)


class Attention(nn.Module):
    """Causal multi-head attention with a fused query-key-value projection."""

    def __init__(self, layer: int, dim: int, n_heads: int, positions: str, norm: Callable[[int], nn.Module]) -> None:
        """`norm` is that of queries and keys."""
        super().__init__()
        self.layer, self.n_heads = layer, n_heads
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.q_norm, self.k_norm = norm(dim), norm(dim)
        self.turn = turn_neighbours if positions == "llama_rotary" else turn_halves

    def forward(self, x_BTD: Tensor, rotary: Rotary, store: KVCache | Window | Packed | None) -> Tensor:
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
        if isinstance(store, Packed):
            out_BHTK = attend_packed(q_BHTK, k_BHTK, v_BHTK, store)
        else:
            mask = None
            if store is not None:
                k_BHTK, v_BHTK, mask = store.extend(self.layer, k_BHTK, v_BHTK)
            out_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, causal=T > 1, mask=mask)
        return self.out_proj(out_BHTK.transpose(1, 2).reshape(B, T, D))  # type: ignore[no-any-return]

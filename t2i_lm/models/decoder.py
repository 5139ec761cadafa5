"""An open_lm-compatible decoder (mlfoundations/open_lm at commit 9bb92ef), all of it in this file.

In order: config, initialization, norms, feed-forward layers, attention, block, decoder. Attribute names are open_lm's,
so state dicts map name by name (`models/open_lm.py`). Two things differ in form, not in value: token rows are stored in
blocks, and the output module computes the loss (`token_rows.py`).

Shapes: `B` batch, `T` tokens, `D` width, `H` heads, `K` head dim, `F` feed-forward width, `V` vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import get_type_hints

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.cache import Columns, KVCache, Prompts, Window
from t2i_lm.models.packing import ModalitySplit, Packed, TargetIndex
from t2i_lm.models.token_rows import Embedding, Output

POSITIONS = ("rotary", "llama_rotary", "head_rotary", "none")
ROTARY = ("rotary", "llama_rotary")
ROTARY_BASE = 10_000.0
Rotary = tuple[Tensor, Tensor] | None  # cosines and sines that broadcast to (B, H, T, K)
Store = Prompts | Columns | Packed | None  # where a block's keys and values go, and what it attends to besides them
SHORT = 512  # positions up to which bfloat16 attention on a CPU materializes the scores
HALF = (torch.float16, torch.bfloat16)
CUDA_BUCKET = 128  # cache columns: 9 CUDA graphs for 1,088 positions; a step reads 64 columns too many on average


TYPES = {int: "a whole number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class DecoderConfig:
    """open_lm's model JSON, under its key names."""

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
        for name, kind in get_type_hints(DecoderConfig).items():
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {TYPES[kind]}")
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


def fan_in_normal_(weight: Tensor, generator: Generator, depth: int | None = None) -> None:
    """Normal of std 1/sqrt(fan-in), divided by sqrt(2 depth) if a depth is given, truncated at 3 std; in place."""
    std = 1 / math.sqrt(weight.shape[1])
    std = std if depth is None else std / math.sqrt(2 * depth)
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)


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


# open_lm's low-precision (`lp_`) norms differ only in their dtype under autocast, which torch's autocast rules decide
# here; in float32 they are the same function.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "default_layer_norm": nn.LayerNorm,
    "lp_layer_norm": nn.LayerNorm,
    "gain_only_layer_norm": lambda dim: nn.LayerNorm(dim, bias=False),
    "gain_only_lp_layer_norm": lambda dim: nn.LayerNorm(dim, bias=False),
    "no_wb_layer_norm": lambda dim: nn.LayerNorm(dim, elementwise_affine=False),
    "rms_norm": RMSNorm,
}


def swiglu_width(dim: int) -> int:
    """8/3 of the model width, rounded up to a multiple of 256."""
    return 256 * ((int(8 * dim / 3) + 255) // 256)


class SwiGLU(nn.Module):
    """w3(silu(gate) * value) with gate and value from one projection `w12`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = swiglu_width(dim)
        self.w12 = nn.Linear(dim, 2 * width, bias=False)
        self.w3 = nn.Linear(width, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, value_BTF = self.w12(x_BTD).chunk(2, dim=-1)
        return self.w3(F.silu(gate_BTF) * value_BTF)  # type: ignore[no-any-return]

    def reset_parameters(self, depth: int, generator: Generator) -> None:
        """Truncated normals of std 1/sqrt(fan-in), the output projection scaled by depth (counted from 1)."""
        fan_in_normal_(self.w12.weight, generator)
        fan_in_normal_(self.w3.weight, generator, depth)


class GELU(nn.Sequential):
    """Two projections around an exact GELU; four times the model width."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))

    def reset_parameters(self, depth: int, generator: Generator) -> None:
        """As `SwiGLU`'s."""
        first, _, second = self
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        fan_in_normal_(first.weight, generator)
        fan_in_normal_(second.weight, generator, depth)


class GemmaGeGLU(nn.Module):
    """down_proj(gelu(gate_proj) * up_proj), with biases."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = swiglu_width(dim)
        self.gate_proj = nn.Linear(dim, width)
        self.up_proj = nn.Linear(dim, width)
        self.down_proj = nn.Linear(width, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))  # type: ignore[no-any-return]

    @torch.no_grad()
    def reset_parameters(self, depth: int, generator: Generator) -> None:
        """Torch's default uniform initialization: upstream defines another and never calls it."""
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            bound = 1 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)


FEED_FORWARDS: dict[str, Callable[[int], SwiGLU | GELU | GemmaGeGLU]] = {
    "swiglu": SwiGLU,
    "swiglu_torch": SwiGLU,
    "gelu": GELU,
    "gemma_geglu": GemmaGeGLU,
}


def rotary_table(positions: str, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, K) of each entry's angle."""
    inv_freq = 1.0 / (ROTARY_BASE ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angles = torch.outer(torch.arange(length).float(), inv_freq)
    pairs = positions == "llama_rotary"
    angles = angles.repeat_interleave(2, dim=-1) if pairs else torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def turn_halves(x: Tensor) -> Tensor:
    """Quarter turn of the pairs (x_i, x_{i+K/2}), which `rotary` rotates."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def turn_neighbors(x: Tensor) -> Tensor:
    """Quarter turn of the pairs (x_2i, x_2i+1), which `llama_rotary` rotates."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention; the mask is added to the scores.

    Torch's bfloat16 flash kernel for CPUs is slow on short sequences (5 times slower than plain products at
    104 positions, 1.5 times at 320), which therefore use plain products. These round the scores to bfloat16 before the
    softmax, where the kernel keeps them in float32: of 512 positions, the relative error is 0.3 % instead of 0.2 % at
    scores of standard deviation 1, and 0.9 % at 4. The kernel is also slow on one position: compiled
    sums, which read keys and values once, make a whole step an eighth shorter.
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
    """Causal attention within each packed sequence.

    The variable-length kernel exists for half precision on GPUs; elsewhere queries, keys and values are padded again,
    a small part of the whole work.
    """
    if q_1HNK.is_cuda and v_1HNK.dtype in HALF and q_1HNK.shape[-1] % 8 == 0:
        q_NHK, k_NHK, v_NHK = (x[0].transpose(0, 1).to(v_1HNK.dtype) for x in (q_1HNK, k_1HNK, v_1HNK))
        offsets_S, T = packed.offsets_S, packed.shape[1]
        out_NHK = varlen_attn(q_NHK, k_NHK, v_NHK, offsets_S, offsets_S, T, T, window_size=(-1, 0))
        assert isinstance(out_NHK, Tensor)
        return out_NHK.transpose(0, 1)[None]
    out_BHTK = attend(packed.pad(q_1HNK), packed.pad(k_1HNK), packed.pad(v_1HNK), causal=True)
    return packed.unpad(out_BHTK)


def attend_with(store: Store, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor) -> Tensor:
    """Causal attention to the given keys and those of the store, which takes them; heads joined (B, T, D)."""
    B, H, T, K = q_BHTK.shape
    if isinstance(store, Packed):
        out_BHTK = attend_packed(q_BHTK, k_BHTK, v_BHTK, store)
    else:
        mask = None
        if store is not None:
            k_BHTK, v_BHTK, mask = store.extend(k_BHTK, v_BHTK)
        out_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, causal=T > 1, mask=mask)
    return out_BHTK.transpose(1, 2).reshape(B, T, H * K)


class Attention(nn.Module):
    """Causal multi-head attention with a fused query-key-value projection."""

    def __init__(self, dim: int, n_heads: int, positions: str, norm: Callable[[int], nn.Module]) -> None:
        """`norm` applies to queries and keys."""
        super().__init__()
        self.n_heads = n_heads
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.q_norm, self.k_norm = norm(dim), norm(dim)
        self.turn = turn_neighbors if positions == "llama_rotary" else turn_halves

    def project(self, x_BTD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, K) of the input's positions, normalized and rotated."""
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
        return q_BHTK, k_BHTK, v_BHTK

    def forward(self, x_BTD: Tensor, rotary: Rotary, store: Store) -> Tensor:
        return self.out_proj(attend_with(store, *self.project(x_BTD, rotary)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        norm = NORMS[config.model_norm] if config.qk_norm else lambda _: nn.Identity()
        self.attention = Attention(config.hidden_dim, config.n_heads, config.positional_embedding_type, norm)
        self.feed_forward = FEED_FORWARDS[config.ffn_type](config.hidden_dim)
        self.attention_norm = NORMS[config.model_norm](config.hidden_dim)
        self.ffn_norm = NORMS[config.model_norm](config.hidden_dim)

    def forward(self, x_BTD: Tensor, rotary: Rotary, store: Store) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, store)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))  # type: ignore[no-any-return]


def _block_step(block: Block, x_B1D: Tensor, rotary: Rotary, store: Store) -> Tensor:
    """A block as a function, whose compiled code all blocks share."""
    return block.forward(x_B1D, rotary, store)


def _vary(x_B1D: Tensor, rotary: Rotary, columns: Columns) -> None:
    """Marks batch and columns as variable; `dynamic=True` would tie sizes that happen to be equal to each other."""
    from torch._dynamo import maybe_mark_dynamic  # seconds to import

    batched = [x_B1D, *(rotary or ()), columns.keys_BHTK, columns.values_BHTK]
    if columns.mask_B11T is not None:
        batched.append(columns.mask_B11T)
        maybe_mark_dynamic(columns.mask_B11T, 3)
    for tensor in batched:
        maybe_mark_dynamic(tensor, 0)
    for tensor in (columns.keys_BHTK, columns.values_BHTK):
        maybe_mark_dynamic(tensor, 2)


class Decoder(Backbone):
    """The language model; weights are uninitialized until `reset_parameters` or a load.

    `rotary` and `llama_rotary` positions are RoPE on different pairs of entries. `head_rotary`, which the
    released open_lm-1b uses, rotates queries and keys of one head by the same angle at every position and so
    leaves their products unchanged: the model is position-free, and it is implemented as the identity that it
    is. `none` is the same function.

    Attributes:
        bucket: bucket size of `generation_cache`; None for `CUDA_BUCKET` on CUDA, else 1.
    """

    config: DecoderConfig
    ragged_cache = True
    bucket: int | None = None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config, self._checkpointing, self._packing = config, False, False
        self._compiled_block: Callable[[Block, Tensor, Rotary, Store], Tensor] | None = None
        self.tok_embeddings = Embedding(config.vocab_size, config.hidden_dim)
        embed_norm = NORMS[config.model_norm] if config.post_embed_norm else lambda _: nn.Identity()
        self.post_embed_norm = embed_norm(config.hidden_dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = NORMS[config.model_norm](config.hidden_dim)
        self.output = Output(config.vocab_size, config.hidden_dim)
        if config.weight_tying:
            self.output.text = self.tok_embeddings.text
        if config.positional_embedding_type in ROTARY:
            head_dim = config.hidden_dim // config.n_heads
            cos_TK, sin_TK = rotary_table(config.positional_embedding_type, config.seq_len, head_dim)
            self.register_buffer("rotary_cos", cos_TK, persistent=False)
            self.register_buffer("rotary_sin", sin_TK, persistent=False)

    def rotary(self, length: int) -> Rotary:
        """Cosines and sines (T, K) of the first positions; None for a position-free model.

        Raises:
            ValueError: if there are more than `seq_len`.
        """
        if self.config.positional_embedding_type not in ROTARY:
            return None
        self._require_positions(length)
        return self.get_buffer("rotary_cos")[:length], self.get_buffer("rotary_sin")[:length]

    def _require_positions(self, length: int) -> None:
        if self.config.positional_embedding_type in ROTARY and length > self.config.seq_len:
            raise ValueError(f"position {length} is past the decoder's seq_len={self.config.seq_len}")

    def hidden(self, ids_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        x_BTD = self._hidden(ids_BT, self.rotary(ids_BT.shape[1]), cache)
        if cache is not None:
            cache.prefilled(ids_BT.shape[1])
        return x_BTD

    def target_index(self, mask_BT: Tensor) -> TargetIndex:
        return TargetIndex.from_mask(mask_BT, self._packing)

    def hidden_at(self, ids_BT: Tensor, index: TargetIndex) -> Tensor:
        if index.packed is None and index.split is None:
            return super().hidden_at(ids_BT, index)
        packed, rotary = index.packed, self.rotary(ids_BT.shape[1])
        if packed is None:
            return index.select(self._hidden(ids_BT, rotary, None, index.split))
        if rotary is not None:
            rotary = rotary[0][packed.position_N], rotary[1][packed.position_N]
        x_1ND = self._hidden(packed.pack(ids_BT), rotary, packed, index.split)
        return x_1ND[0].index_select(0, packed.target_M)

    def _hidden(
        self, ids_BT: Tensor, rotary: Rotary, store: KVCache | Packed | None, split: ModalitySplit | None = None
    ) -> Tensor:
        """Final normalized hidden states; a dense decoder has no use for `split`."""
        x_BTD = self.post_embed_norm(self.tok_embeddings(ids_BT))
        return self.norm(self._through_blocks(x_BTD, rotary, store))  # type: ignore[no-any-return]

    def _through_blocks(
        self, x_BTD: Tensor, rotary: Rotary, store: KVCache | Window | Packed | None, *more: ModalitySplit
    ) -> Tensor:
        """States after all blocks, which get the further arguments too."""
        if isinstance(store, KVCache | Window):
            columns = store.prompts() if isinstance(store, KVCache) else store.layers
            for block, own in zip(self.layers, columns, strict=True):
                # Bypasses `torch.compile`, whose graphs are for training.
                x_BTD = block.forward(x_BTD, rotary, own, *more)
            return x_BTD
        for block in self.layers:
            if self._checkpointing and self.training:
                x_BTD = checkpoint(block, x_BTD, rotary, store, *more, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotary, store, *more)
        return x_BTD

    def next_hidden(self, ids_B: Tensor, cache: KVCache, image_rows_only: bool = False) -> Tensor:
        window = cache.next_window()
        if cache.graphs is None:
            return self._step(ids_B, window, image_rows_only)
        key = window, image_rows_only
        return cache.graphs.run(key, lambda own_B: self._step(own_B, window, image_rows_only), ids_B)

    def _step(self, ids_B: Tensor, window: Window, image_rows_only: bool) -> Tensor:
        post_embed_norm, blocks, norm = self._step_modules(image_rows_only)
        x_B1D = post_embed_norm(self.tok_embeddings(ids_B[:, None], image_rows_only))
        rotary: Rotary = None
        if self.config.positional_embedding_type in ROTARY:
            cos_B11K = self.get_buffer("rotary_cos")[window.position_B][:, None, None]
            rotary = cos_B11K, self.get_buffer("rotary_sin")[window.position_B][:, None, None]
        step = self._compiled_block or Block.forward
        if self._compiled_block is not None:
            _vary(x_B1D, rotary, window.layers[0])  # the first layer's call compiles
        for block, columns in zip(blocks, window.layers, strict=True):
            assert isinstance(block, Block)
            x_B1D = step(block, x_B1D, rotary, columns)
        return norm(x_B1D)[:, 0]  # type: ignore[no-any-return]

    def _step_modules(self, image_rows_only: bool) -> tuple[nn.Module, Iterable[nn.Module], nn.Module]:
        """Norm of the embedding, blocks and final norm of one more position."""
        return self.post_embed_norm, self.layers, self.norm

    def compile_steps(self) -> None:
        """Compiles the blocks of `next_hidden`: some seconds at the first images, then less time per token.

        One block is compiled once, with variable sizes, for all layers, batches and lengths of the cache.
        """
        self._compiled_block = torch.compile(_block_step)

    @property
    def generates_compiled(self) -> bool:
        """Whether the step is compiled; steps bypass the blocks that `trainer.compile` compiles."""
        return self._compiled_block is not None

    def enable_activation_checkpointing(self) -> None:
        self._checkpointing = True

    def enable_packing(self) -> None:
        self._packing = True

    def new_cache(self, batch: int, length: int) -> KVCache:
        """A static cache on the decoder's device.

        Raises:
            ValueError: if `length` exceeds the positions of a decoder that has any.
        """
        return self._cache(batch, length, self._empty_cache(1))

    def generation_cache(self, batch: int, length: int, used: KVCache | None = None) -> KVCache:
        """As `new_cache`, on CUDA with buckets and graphs, reused from a `used` cache of the same size.

        Raises:
            ValueError: if `length` exceeds the positions of a decoder that has any.
        """
        bucket = self.bucket or (CUDA_BUCKET if self.output.text.is_cuda else 1)
        return self._cache(batch, length, used or self._empty_cache(bucket))

    def _empty_cache(self, bucket: int) -> KVCache:
        config = self.config
        head_dim = config.hidden_dim // config.n_heads
        return KVCache(config.n_layers, config.n_heads, head_dim, self.output.text, bucket)

    def _cache(self, batch: int, length: int, cache: KVCache) -> KVCache:
        self._require_positions(length)
        cache.reset(batch, length)
        return cache

    @torch.no_grad()
    def reset_parameters(self, generator: Generator) -> None:
        """open_lm's initialization: truncated normals of std 1/sqrt(fan-in), output projections scaled by depth."""
        for depth, block in enumerate(self.layers, start=1):
            assert isinstance(block, Block)
            fan_in_normal_(block.attention.in_proj.weight, generator)
            fan_in_normal_(block.attention.out_proj.weight, generator, depth)
            block.feed_forward.reset_parameters(depth, generator)
        fan_in_normal_(self.output.text, generator)
        if not self.config.weight_tying:
            fan_in_normal_(self.tok_embeddings.text, generator)

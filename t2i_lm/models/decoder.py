"""An open_lm-compatible decoder (mlfoundations/open_lm at commit 9bb92ef).

Attribute names are open_lm's, so state dicts map name by name (`models/open_lm.py`). Two things differ in
form, not in value: token rows are kept in blocks, and the loss is computed inside the output module's forward
(`token_rows.py`).

Shapes: `B` batch, `T` tokens, `D` width, `H` heads, `K` head dim, `F` feed-forward width, `V` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2i_lm.models.attention import POSITIONS, ROTARY, Attention, Rotary, rotary_table
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.cache import KVCache, Window
from t2i_lm.models.feed_forward import FEED_FORWARDS, fan_in_normal_
from t2i_lm.models.norms import NORMS
from t2i_lm.models.packing import Packed
from t2i_lm.models.token_rows import Embedding, Output
from t2i_lm.models.wanted import Wanted

CUDA_BUCKET = 128  # 9 graphs for 1,088 positions, of which a step reads 64 more on average than it must


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


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, layer: int, config: DecoderConfig) -> None:
        super().__init__()
        norm = NORMS[config.model_norm] if config.qk_norm else lambda _: nn.Identity()
        self.attention = Attention(layer, config.hidden_dim, config.n_heads, config.positional_embedding_type, norm)
        self.feed_forward = FEED_FORWARDS[config.ffn_type](config.hidden_dim)
        self.attention_norm = NORMS[config.model_norm](config.hidden_dim)
        self.ffn_norm = NORMS[config.model_norm](config.hidden_dim)

    def forward(self, x_BTD: Tensor, rotary: Rotary, store: KVCache | Window | Packed | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, store)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))  # type: ignore[no-any-return]


class Decoder(Backbone):
    """The language model; weights are uninitialised until `reset_parameters` or a load.

    `rotary` and `llama_rotary` positions are RoPE on different pairs of entries. `head_rotary`, which the
    released open_lm-1b uses, rotates queries and keys of one head by the same angle at every position and so
    leaves their products unchanged: the model is position-free, and it is implemented as the identity that it
    is. `none` is the same function.

    Attributes:
        bucket: columns by which the cache that a step of a drawing reads grows; None is `CUDA_BUCKET` on CUDA, else 1.
    """

    config: DecoderConfig
    ragged_cache = True
    bucket: int | None = None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config, self._checkpointing, self._packing = config, False, False
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
            head_dim = config.hidden_dim // config.n_heads
            cos_TK, sin_TK = rotary_table(config.positional_embedding_type, config.seq_len, head_dim)
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
        x_BTD = self._hidden(ids_BT, self.rotary(ids_BT.shape[1]), cache)
        if cache is not None:
            cache.prefilled(ids_BT.shape[1])
        return x_BTD

    def wanted(self, wanted_BT: Tensor) -> Wanted:
        """Where the mask holds, and what is computed for it."""
        return Wanted.where(wanted_BT, self._packing)

    def wanted_hidden(self, ids_BT: Tensor, wanted: Wanted) -> Tensor:
        """Final normalised hidden states (N, D) where wanted, without computing what they do not depend on."""
        packed, rotary = wanted.packed, self.rotary(ids_BT.shape[1])
        if packed is None:
            return super().wanted_hidden(ids_BT, wanted)
        if rotary is not None:
            rotary = rotary[0][packed.position_N], rotary[1][packed.position_N]
        return self._hidden(packed.pack(ids_BT), rotary, packed)[0].index_select(0, packed.wanted_M)

    def _hidden(self, ids_BT: Tensor, rotary: Rotary, store: KVCache | Packed | None) -> Tensor:
        x_BTD = self.post_embed_norm(self.tok_embeddings(ids_BT))
        for block in self.layers:
            if isinstance(store, KVCache):
                x_BTD = block.forward(x_BTD, rotary, store)  # past `torch.compile`, whose graphs are of training
            elif self._checkpointing and self.training:
                x_BTD = checkpoint(block, x_BTD, rotary, store, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotary, store)
        return self.norm(x_BTD)  # type: ignore[no-any-return]

    def next_hidden(self, ids_B: Tensor, cache: KVCache, image_rows_only: bool = False) -> Tensor:
        """Final normalised hidden states (B, D) of one more position."""
        step, window = self._compiled_step or self._step, cache.next_window()
        if cache.graphs is None:
            return step(ids_B, window, image_rows_only)
        return cache.graphs.run((window, image_rows_only), lambda own_B: step(own_B, window, image_rows_only), ids_B)

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

    @property
    def draws_compiled(self) -> bool:
        """Whether the step is compiled; the blocks that `trainer.compile` compiles are passed by."""
        return self._compiled_step is not None

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each block in the backward pass."""
        self._checkpointing = True

    def enable_packing(self) -> None:
        """Computes in `wanted_hidden` only what is needed."""
        self._packing = True

    def new_cache(self, batch: int, length: int) -> KVCache:
        """A static cache on the decoder's device.

        Raises:
            ValueError: if a decoder with positions has fewer.
        """
        return self._cache(batch, length, self._empty_cache(1))

    def drawing_cache(self, batch: int, length: int, used: KVCache | None = None) -> KVCache:
        """As `new_cache`, with buckets and graphs on CUDA, which a `used` cache of the same size has already.

        Raises:
            ValueError: if a decoder with positions has fewer.
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
        """open_lm's initialisation: truncated normals of std 1/sqrt(fan-in), output projections scaled by depth."""
        for depth, block in enumerate(self.layers, start=1):
            assert isinstance(block, Block)
            fan_in_normal_(block.attention.in_proj.weight, generator)
            fan_in_normal_(block.attention.out_proj.weight, generator, depth)
            block.feed_forward.reset_parameters(depth, generator)
        fan_in_normal_(self.output.text, generator)
        if not self.config.weight_tying:
            fan_in_normal_(self.tok_embeddings.text, generator)

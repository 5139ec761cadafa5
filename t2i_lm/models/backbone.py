"""Interface of a language model: hidden states between row-blocked embedding and output matrices.

Shapes: `B` batch, `T` tokens, `N` targets, `D` width, `V` vocabulary.
"""

from typing import Any, Protocol

from torch import Generator, Tensor, nn

from t2i_lm.models.cross_entropy import LossBackend, TokenLoss, linear_cross_entropy
from t2i_lm.models.packing import TargetIndex
from t2i_lm.models.token_rows import Embedding, Output


class BackboneShape(Protocol):
    """Sizes of a language model before its vocabulary is expanded."""

    @property
    def hidden_dim(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def weight_tying(self) -> bool: ...


class Backbone(nn.Module):
    """A decoder-only language model: `Decoder` for open_lm, `HuggingFaceDecoder` for the rest.

    Attributes:
        config: sizes.
        tok_embeddings, output: token rows; one parameter if tied.
        ragged_cache: whether one cache can hold prompts of different lengths (`KVCache.place`).
    """

    ragged_cache = False

    config: BackboneShape
    tok_embeddings: Embedding
    output: Output

    def hidden(self, ids_BT: Tensor, cache: Any = None) -> Tensor:
        """Final normalized hidden states (B, T, D); an empty cache is filled for `next_hidden`."""
        raise NotImplementedError

    def target_index(self, mask_BT: Tensor) -> TargetIndex:
        """Index of the N positions in the mask, for `hidden_at`; synchronizes if the mask is on a GPU."""
        return TargetIndex.from_mask(mask_BT)

    def with_inputs(self, index: TargetIndex, ids_BT: Tensor) -> TargetIndex:
        """The index with what `hidden_at` is to know of its ids; synchronizes if these are on a GPU."""
        return index

    def hidden_at(self, ids_BT: Tensor, index: TargetIndex) -> Tensor:
        """Final normalized hidden states (N, D) of N positions."""
        return index.select(self.hidden(ids_BT))

    def next_hidden(self, ids_B: Tensor, cache: Any, image_rows_only: bool = False) -> Tensor:
        """Final normalized hidden states (B, D) of one more position.

        `ids_B` are joint ids, or image codes if `image_rows_only`.
        """
        raise NotImplementedError

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        raise NotImplementedError

    def enable_packing(self) -> None:
        """Leaves pads out of `hidden_at`.

        Raises:
            ValueError: if the model cannot.
        """
        raise NotImplementedError

    def compile_steps(self) -> None:
        """Compiles `next_hidden`.

        Raises:
            ValueError: if the model cannot.
        """
        raise NotImplementedError

    @property
    def generates_compiled(self) -> bool:
        """Whether `next_hidden` runs compiled code."""
        raise NotImplementedError

    def new_cache(self, batch: int, length: int) -> Any:
        """An empty key-value cache for `batch` sequences of at most `length` positions."""
        raise NotImplementedError

    def generation_cache(self, batch: int, length: int, used: Any = None) -> Any:
        """As `new_cache`, in the form that generates images fastest.

        The result of `next_hidden` is then valid until its next call. `used` is the cache of a finished batch, whose
        memory may be reused.
        """
        return self.new_cache(batch, length)

    def reset_parameters(self, generator: Generator) -> None:
        """Initializes all weights as the model's authors do, from the generator alone."""
        raise NotImplementedError

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V) float32."""
        return self.output(self.hidden(ids_BT))  # type: ignore[no-any-return]

    def loss(
        self,
        ids_BT: Tensor,
        target_BT: Tensor,
        index: TargetIndex | None = None,
        image_rows_only: bool = False,
        weight_N: Tensor | None = None,
        backend: LossBackend = linear_cross_entropy,
    ) -> TokenLoss:
        """Loss of the N targets in `index` (default: all B * T); the other arguments are those of `Output.loss`."""
        if index is None:
            x_ND, target_N = self.hidden(ids_BT).flatten(0, 1), target_BT.flatten()
        else:
            x_ND, target_N = self.hidden_at(ids_BT, index), index.select(target_BT)
        return self.output.loss(x_ND, target_N, image_rows_only, weight_N, backend)

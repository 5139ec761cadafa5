"""What the suite asks of a language model: hidden states over row-blocked embedding and output matrices.

Shapes: `B` batch, `T` tokens, `N` targets, `D` width, `V` vocabulary.
"""

from typing import Any, Protocol

from torch import Generator, Tensor, nn

from t2i_lm.models.cross_entropy import TokenLoss
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
        config: its sizes.
        tok_embeddings, output: token rows; one parameter where they are tied.
        ragged_cache: whether one cache holds prompts of several lengths (`KVCache.place`).
    """

    ragged_cache = False

    config: BackboneShape
    tok_embeddings: Embedding
    output: Output

    def hidden(self, ids_BT: Tensor, cache: Any = None) -> Tensor:
        """Final normalized hidden states (B, T, D); an empty cache keeps what later positions need."""
        raise NotImplementedError

    def wanted(self, wanted_BT: Tensor) -> TargetIndex:
        """What `hidden_at` takes for the N positions where the mask holds; of one on a GPU, waits for it."""
        return TargetIndex.where(wanted_BT)

    def hidden_at(self, ids_BT: Tensor, wanted: TargetIndex) -> Tensor:
        """Final normalized hidden states (N, D) of N positions."""
        return wanted.of(self.hidden(ids_BT))

    def next_hidden(self, ids_B: Tensor, cache: Any, image_rows_only: bool = False) -> Tensor:
        """Final normalized hidden states (B, D) of one more position.

        `ids_B` are joint ids, or image codes where `image_rows_only`.
        """
        raise NotImplementedError

    def enable_activation_checkpointing(self) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        raise NotImplementedError

    def enable_packing(self) -> None:
        """Leaves pads out of `hidden_at`, where the model can.

        Raises:
            ValueError: if it cannot.
        """
        raise NotImplementedError

    def compile_steps(self) -> None:
        """Compiles `next_hidden`, where the model can.

        Raises:
            ValueError: if it cannot.
        """
        raise NotImplementedError

    @property
    def draws_compiled(self) -> bool:
        """Whether `next_hidden` runs compiled code."""
        raise NotImplementedError

    def new_cache(self, batch: int, length: int) -> Any:
        """An empty key-value cache for `batch` sequences of at most `length` positions."""
        raise NotImplementedError

    def drawing_cache(self, batch: int, length: int, used: Any = None) -> Any:
        """As `new_cache`, in the form that draws images fastest.

        What `next_hidden` returns with it lasts until its next call. `used` is the cache of a batch that is drawn,
        whose memory may be taken over.
        """
        return self.new_cache(batch, length)

    def reset_parameters(self, generator: Generator) -> None:
        """Draws all weights as the model's authors do, from the generator alone."""
        raise NotImplementedError

    def forward(
        self,
        ids_BT: Tensor,
        target_BT: Tensor | None = None,
        valid: Tensor | TargetIndex | None = None,
        image_rows_only: bool = False,
        weight_N: Tensor | None = None,
    ) -> Tensor | TokenLoss:
        """Logits (B, T, V) float32, or the loss of the N targets that are valid (all by default).

        `valid` is a mask (B, T), or what `wanted` has made of it on the host. `weight_N` are factors of the targets in
        the loss's `total`.
        """
        if target_BT is None:
            return self.output(self.hidden(ids_BT))  # type: ignore[no-any-return]
        if valid is None:
            return self.output(self.hidden(ids_BT).flatten(0, 1), target_BT.flatten(), weight_N=weight_N)  # type: ignore[no-any-return]
        if isinstance(valid, Tensor):
            valid = self.wanted(valid)
        x_ND = self.hidden_at(ids_BT, valid)
        return self.output(x_ND, valid.of(target_BT), image_rows_only, weight_N)  # type: ignore[no-any-return]

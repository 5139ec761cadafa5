"""Modality experts: image positions with norms, attention projections and feed-forward layers of their own.

As in Mixture-of-Transformers (Liang et al., 2024, arXiv:2411.04996) and LMFusion (Shi et al., 2024, arXiv:2412.15188):
each position passes one half of every block, chosen by its id, and attends to the positions of both. A position costs
as many operations as in the dense model. The text half keeps the dense model's names and values; the image half starts
as its copy. With text half and text rows frozen, the logits of plain text over the text rows stay equal to the bit.

Shapes: those of `decoder.py`; `N` positions of a batch sorted by modality (`packing.ModalitySplit`), `1` before it.
"""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.cache import KVCache, Window
from t2i_lm.models.decoder import ROTARY, Block, Decoder, Rotary, Store, attend_with
from t2i_lm.models.packing import ModalitySplit, Packed, TargetIndex


class ExpertBlock(Block):
    """A block whose own layers compute text positions, and whose `image` block those of images."""

    def __init__(self, block: Block) -> None:
        """Takes over the layers of `block`, and copies them."""
        nn.Module.__init__(self)  # no second set of weights
        for name, layer in block.named_children():
            setattr(self, name, layer)
        self.image: Block = copy.deepcopy(block)

    def forward(self, x_1ND: Tensor, rotary: Rotary, store: Store, split: ModalitySplit | None = None) -> Tensor:
        """The block of sorted positions; `rotary` has a row for each of these."""
        assert split is not None
        halves: tuple[Block, Block] = (self, self.image)
        x_HALVES = split.halves(x_1ND)
        projected = [
            half.attention.project(half.attention_norm(x), _rows(rotary, part))
            for half, x, part in zip(halves, x_HALVES, (slice(split.text), slice(split.text, None)), strict=True)
        ]
        q, k, v = (
            split.unsort(torch.cat(parts, dim=2).transpose(1, 2)).transpose(1, 2)
            for parts in zip(*projected, strict=True)
        )
        out_HALVES = split.halves(split.sort(attend_with(store, q, k, v)))
        done = []
        for half, x, out in zip(halves, x_HALVES, out_HALVES, strict=True):
            own = x + half.attention.out_proj(out)
            done.append(own + half.feed_forward(half.ffn_norm(own)))
        return torch.cat(done, dim=1)


class ExpertDecoder(Decoder):
    """A decoder with modality experts.

    Attributes:
        first_image: the first id of the image half, which has ids from `<image>` on (`<image>`, `</image>`, `<pad>`,
            image codes).
        image_norm, image_post_embed_norm: the image half of the norms outside the blocks.
    """

    def __init__(self, dense: Decoder, first_image: int) -> None:
        """Takes over the tensors of `dense`, whose vocabulary is expanded, and copies its layers."""
        with torch.device("meta"):  # all of it is replaced
            super().__init__(dense.config)
        for name, part in dense.named_children():
            setattr(self, name, part)
        for name, table in dense.named_buffers(recurse=False):
            self.register_buffer(name, table, persistent=False)
        self.layers = nn.ModuleList(ExpertBlock(block) for block in dense.layers if isinstance(block, Block))
        self.image_post_embed_norm = copy.deepcopy(self.post_embed_norm)
        self.image_norm = copy.deepcopy(self.norm)
        self.first_image = first_image

    def with_inputs(self, index: TargetIndex, ids_BT: Tensor) -> TargetIndex:
        computed = ids_BT if index.packed is None else index.packed.pack(ids_BT)
        return index._replace(split=ModalitySplit.from_ids(computed, self.first_image))

    def _hidden(
        self,
        ids_BT: Tensor,
        rotary: Rotary,
        store: KVCache | Window | Packed | None,
        split: ModalitySplit | None = None,
    ) -> Tensor:
        """Final normalized hidden states; without a split, of the ids."""
        split = ModalitySplit.from_ids(ids_BT, self.first_image) if split is None else split
        if rotary is not None:
            row_N = split.order_N % len(rotary[0])
            rotary = rotary[0][row_N], rotary[1][row_N]
        x_1ND = self.tok_embeddings(split.sort(ids_BT))
        x_1ND = _normed((self.post_embed_norm, self.image_post_embed_norm), x_1ND, split)
        x_1ND = self._through_blocks(x_1ND, rotary, store, split)
        return split.unsort(_normed((self.norm, self.image_norm), x_1ND, split))

    def next_hidden(self, ids_B: Tensor, cache: KVCache, image_rows_only: bool = False) -> Tensor:
        if image_rows_only:
            return super().next_hidden(ids_B, cache, image_rows_only)
        window, rotary = cache.next_window(), None  # of either modality: neither compiled nor captured
        if self.config.positional_embedding_type in ROTARY:
            cos_LK, sin_LK = self.get_buffer("rotary_cos"), self.get_buffer("rotary_sin")
            rotary = cos_LK[window.position_B], sin_LK[window.position_B]
        return self._hidden(ids_B[:, None], rotary, window)[:, 0]

    def _step_modules(self, image_rows_only: bool) -> tuple[nn.Module, Iterable[nn.Module], nn.Module]:
        assert image_rows_only
        blocks = [block.image for block in self.layers if isinstance(block, ExpertBlock)]
        return self.image_post_embed_norm, blocks, self.image_norm


def add_modality_experts(dense: Backbone, first_image: int) -> ExpertDecoder:
    """The decoder with modality experts that computes what `dense` does, whose tensors it takes over.

    Args:
        dense: an expanded decoder of open_lm, not yet frozen, compiled or sharded.
        first_image: the first id of the image half.

    Raises:
        ValueError: if it is another backbone.
    """
    if type(dense) is not Decoder:
        raise ValueError(
            f"modality_experts=True: expected false, {type(dense).__name__} is not open_lm's decoder; no other blocks "
            "are split by modality"
        )
    return ExpertDecoder(dense, first_image)


def expert_of(backbone: nn.Module, name: str) -> str | None:
    """The half that a parameter belongs to, by its name: `text` or `image`; None for token rows and dense models."""
    if not isinstance(backbone, ExpertDecoder) or name.startswith(("tok_embeddings.", "output.")):
        return None
    return "image" if ".image." in name or name.startswith("image_") else "text"


def idle_parameters(backbone: nn.Module) -> int:
    """Parameters that a position does not use: one half of a model with modality experts, both of which are alike."""
    return sum(
        parameter.numel() for name, parameter in backbone.named_parameters() if expert_of(backbone, name) == "image"
    )


def _rows(rotary: Rotary, part: slice) -> Rotary:
    return None if rotary is None else (rotary[0][part], rotary[1][part])


def _normed(norms: Sequence[nn.Module], x_1ND: Tensor, split: ModalitySplit) -> Tensor:
    return torch.cat([norm(x) for norm, x in zip(norms, split.halves(x_1ND), strict=True)], dim=1)

"""Hidden states of a decoder after its embedding and after every block, by modality of the position.

Shapes: `S` sequences, `T` positions, `N` chosen positions, `L` blocks, `D` width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2i_lm.analysis.base import PROBED, NotAvailableError
from t2i_lm.data.splits import evenly_spaced_indices
from t2i_lm.experiment.build import ImageModel
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.fsdp import blocks_of
from t2i_lm.models.modality_experts import ExpertDecoder
from t2i_lm.tokenizers.layout import MODALITIES, modality_of_target

POSITIONS = 4096  # per modality at most, evenly spaced
BATCH = 16


@dataclass(frozen=True)
class Positions:
    """Positions of one modality: index (N,) in the flattened sequences, and the sequence (N,) of each."""

    index_N: Tensor
    sequence_N: Tensor


def positions_of(ids_ST: Tensor, model: ImageModel) -> dict[str, Positions]:
    """Positions of text and of image tokens, without modalities that do not occur."""
    modality_ST = modality_of_target(ids_ST, model.layout.vocab)
    found = {}
    for name in PROBED:
        every_N = (modality_ST == MODALITIES.index(name)).flatten().nonzero().squeeze(1)
        if len(every_N):
            index_N = every_N[evenly_spaced_indices(len(every_N), POSITIONS)]
            found[name] = Positions(index_N, index_N // ids_ST.shape[1])
    return found


def probed_blocks(decoder: Backbone) -> list[nn.Module]:
    """The blocks of a decoder, in order.

    Raises:
        NotAvailableError: if they are not in one list, or of modality experts.
    """
    if isinstance(decoder, ExpertDecoder):
        raise NotAvailableError("the blocks of a model with modality experts sort their positions by modality")
    try:
        return blocks_of(decoder)
    except ValueError as error:
        raise NotAvailableError(f"{type(decoder).__name__} has no list of config.n_layers blocks") from error


@torch.no_grad()
def layer_states(
    decoder: Backbone, ids_ST: Tensor, places: dict[str, Positions], advance: Callable[[int], object]
) -> dict[str, list[Tensor]]:
    """States (N, D) of each modality's positions, float32: the input of the first block, then each block's output."""
    blocks = probed_blocks(decoder)
    collected: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]

    def keep(layer: int, x: Any) -> None:
        state_BTD = x[0] if isinstance(x, tuple) else x
        collected[layer].append(state_BTD.float().cpu())

    hooks = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, named: keep(0, args[0] if args else named["hidden_states"]), with_kwargs=True
        ),
        *(
            block.register_forward_hook(lambda _, args, output, layer=layer: keep(layer, output))
            for layer, block in enumerate(blocks, start=1)
        ),
    ]
    rows: dict[str, list[list[Tensor]]] = {name: [[] for _ in collected] for name in places}
    try:
        for start in range(0, len(ids_ST), BATCH):
            ids_BT = ids_ST[start : start + BATCH].to(decoder.output.text.device)
            decoder.hidden(ids_BT)
            first = start * ids_ST.shape[1]
            for name, place in places.items():
                inside = (place.index_N >= first) & (place.index_N < first + ids_BT.numel())
                for layer, (state_BTD,) in enumerate(collected):
                    rows[name][layer].append(state_BTD.flatten(0, 1)[place.index_N[inside] - first])
            for states in collected:
                states.clear()
            advance(len(ids_BT))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: [torch.cat(parts) for parts in layers] for name, layers in rows.items()}


def groups_of(sequence_N: Tensor, sequences: int, groups: int) -> Tensor:
    """Group (N,) of each position: consecutive sequences are a group, of equal size up to one."""
    return sequence_N * min(groups, sequences) // sequences


def require_same_sequences(found: Sequence[Tensor]) -> None:
    """Checks that models were given the same ids, which those of runs with other data or tokenizers are not.

    Raises:
        NotAvailableError: if they were not.
    """
    if not all(torch.equal(ids_ST, found[0]) for ids_ST in found):
        raise NotAvailableError(
            "the runs have other held-out sequences; expected equal ids, of equal data and tokenizers"
        )

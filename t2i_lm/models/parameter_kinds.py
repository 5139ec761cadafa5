"""The kind of every parameter of a backbone, decided from the structure of its modules, never from a list of names.

- `embedding`, `output`: the token rows, further tables with one row per token, and the projections of a factorized
  embedding (OPT-350m) between the rows and the blocks.
- `norm`: parameters of normalization modules, wherever they stand.
- `position`: tables that are indexed by position.
- `attention`: of a block, whatever mixes positions, with all that lies inside (low-rank queries, sinks, indexers):
  attention, and in hybrid models convolutions, state-space models and linear attention.
- `ffn`: of a block, all other maps: feed-forward layers, experts, routers, projections of residual streams.

A parameter that none of this decides has no kind; groups that could contain it are refused (`freeze.py`).
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.modality_experts import expert_of
from t2i_lm.models.token_rows import TokenRows

KINDS = ("embedding", "output", "norm", "attention", "ffn", "position")
# Arguments of `forward` that only modules take which look at other positions than the one they compute.
MIXING_ARGUMENTS = {
    *("attention_mask", "attn_mask", "mask", "alibi", "position_ids", "position_embeddings", "encoder_hidden_states"),
    *("past_key_values", "past_key_value", "layer_past", "cache", "cache_params", "kv_cache"),
    *("rotary", "store"),  # open_lm's decoder
}
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
_NORM_CLASS = re.compile(r"Norm(?![a-z])")
_MIXING_CLASS = re.compile(r"(Attention|Attn)$")
# Offsets of learned positions (OPT's are 2) beyond the model's positions.
_POSITION_OFFSETS = 8


@dataclass(frozen=True)
class Place:
    """Where a parameter stands.

    Attributes:
        name: in `named_parameters`.
        parameter: the parameter itself.
        kind: one of `KINDS`; None where the structure does not decide it.
        layer, layers: index of its block in their list and their number; None outside the blocks.
        candidates: groups that may or may not contain it.
        expert: half of a model with modality experts, `text` or `image`; None for token rows and in other models.
    """

    name: str
    parameter: nn.Parameter
    kind: str | None
    layer: int | None = None
    layers: int | None = None
    candidates: frozenset[str] = frozenset()
    expert: str | None = None

    @property
    def half(self) -> int | None:
        """1 or 2 for a parameter of the first or second half of the blocks (the second has one more if odd)."""
        if self.layer is None or self.layers is None:
            return None
        return 1 if self.layer < self.layers // 2 else 2

    @property
    def rows(self) -> str | None:
        """`text`, `special` or `image` for token rows."""
        name = self.name.rpartition(".")[2]
        return name if self.kind in ("embedding", "output") and name in TokenRows.BLOCKS else None


@dataclass
class _Walk:
    """A walk over the modules of a backbone, in the order of `named_parameters(remove_duplicate=False)`."""

    backbone: Backbone
    blocks: dict[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.row_width = self.backbone.tok_embeddings.text.shape[1]
        self.rows = len(self.backbone.tok_embeddings.text)
        self.blocks = _block_lists(self.backbone)
        hidden = getattr(getattr(getattr(self.backbone, "body", None), "config", None), "hidden_size", None)
        self.hidden = self.row_width if hidden is None else int(hidden)

    def places(
        self, module: nn.Module, path: str, region: str, layer: int | None = None, layers: int | None = None
    ) -> Iterator[Place]:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = _join(path, name)
                kind, candidates = self._kind(module, name, parameter, region)
                if layer is not None and layers is None:
                    candidates |= {"first_half", "second_half"}
                yield Place(full, parameter, kind, layer, layers, candidates, expert_of(self.backbone, full))
        for name, child in module._modules.items():
            if child is None:
                continue
            full = _join(path, name)
            if full in self.blocks:
                for number, (own, block) in enumerate(child._modules.items()):
                    assert block is not None
                    inside = "attention" if _MIXING_CLASS.search(type(block).__name__) else "block"
                    yield from self.places(block, _join(full, own), inside, number, self.blocks[full])
            else:
                yield from self.places(child, full, self._region(module, child, full, region), layer, layers)

    def _region(self, module: nn.Module, child: nn.Module, path: str, region: str) -> str:
        """Where the parameters of a child stand, unless its own children stand elsewhere."""
        if module is self.backbone and path in ("tok_embeddings", "output"):
            return {"tok_embeddings": "embedding", "output": "output"}[path]
        if region == "outside":
            is_list = isinstance(child, nn.ModuleList) and (not self.blocks or _holds_mixer(child))
            return "unknown blocks" if is_list else region
        if region in ("block", "scales"):
            if mixes_positions(child):
                return "block" if _is_container(child) else "attention"
            if isinstance(child, nn.ModuleList) or _holds_mixer(child):
                return "block"
            return "ffn" if _matrices(child) else "scales"
        return region

    def _kind(self, owner: nn.Module, name: str, value: nn.Parameter, region: str) -> tuple[str | None, frozenset[str]]:
        if region in ("embedding", "output"):
            return region, frozenset()
        if region == "unknown blocks":
            return None, frozenset((*KINDS, "first_half", "second_half"))
        if is_norm(owner):
            return "norm", frozenset()
        if self._is_position_table(owner):
            return "position", frozenset()
        if region in ("attention", "ffn"):
            return region, frozenset()
        if region == "outside":
            return self._outside(owner, value)
        if value.ndim > 1:  # the block's own matrix
            return "ffn", frozenset()
        return None, frozenset(("attention", "ffn", "norm"))

    def _outside(self, owner: nn.Module, value: nn.Parameter) -> tuple[str | None, frozenset[str]]:
        """Of a parameter beside the blocks that is no norm and no position."""
        if isinstance(owner, nn.Embedding):
            if owner.num_embeddings == self.rows:
                return "embedding", frozenset()
            return None, frozenset(("embedding", "position"))
        if isinstance(owner, nn.Linear) and owner.in_features != owner.out_features:
            if owner.in_features == self.row_width:
                return "embedding", frozenset()
            if (owner.in_features, owner.out_features) == (self.hidden, self.row_width):
                return "output", frozenset()
        weight = owner._parameters.get("weight")
        is_map = weight is not None and weight.ndim > 1
        return None, frozenset(("embedding", "output", "ffn", *(() if is_map else ("norm", "position"))))

    def _is_position_table(self, owner: nn.Module) -> bool:
        if "Position" in type(owner).__name__ and not owner._modules:
            return True
        positions = getattr(self.backbone.config, "seq_len", None)
        if not isinstance(owner, nn.Embedding) or positions is None:
            return False
        return 0 <= owner.num_embeddings - int(positions) <= _POSITION_OFFSETS


def parameter_places(backbone: Backbone) -> list[Place]:
    """The place of every parameter; a tied one stands under each of its names."""
    found = list(_Walk(backbone).places(backbone, "", "outside"))
    assert [place.name for place in found] == [name for name, _ in backbone.named_parameters(remove_duplicate=False)]
    return found


def _block_lists(backbone: Backbone) -> dict[str, int | None]:
    """The lists of a backbone's blocks by name, with their length; None where the lists have no order among them.

    Of the outermost lists that hold something that mixes positions, it is the one of `config.n_layers` entries, or the
    only one, and lists parallel to it (attentions beside feed-forwards). Else all, if their blocks are of one class.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in backbone.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inner:
            lists[name] = module
    mixing = {name: one for name, one in lists.items() if _holds_mixer(one)}
    fitting = {name: one for name, one in mixing.items() if len(one) == backbone.config.n_layers} or mixing
    if len(fitting) != 1:
        alike = len({type(block) for one in mixing.values() for block in one}) == 1
        return dict.fromkeys(mixing) if alike else {}
    ((name, blocks),) = fitting.items()
    parent, length = name.rpartition(".")[0], len(blocks)
    return {other: length for other, one in lists.items() if (other.rpartition(".")[0], len(one)) == (parent, length)}


def mixes_positions(module: nn.Module) -> bool:
    """Whether a module's output at one position depends on others, by what its `forward` takes, or by its class."""
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    if _MIXING_CLASS.search(type(module).__name__):
        return True
    return not MIXING_ARGUMENTS.isdisjoint(inspect.signature(module.forward).parameters)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes: by its class, or since it has a gain of one dimension and at most a shift."""
    if isinstance(module, _NORMS) or _NORM_CLASS.search(type(module).__name__):
        return not isinstance(module, nn.Linear)
    own: dict[str, Any] = {name: value for name, value in module._parameters.items() if value is not None}
    is_gain = own.keys() <= {"weight", "bias"} and "weight" in own and all(value.ndim == 1 for value in own.values())
    return is_gain and not module._modules and not isinstance(module, nn.PReLU)


def _holds_mixer(module: nn.Module) -> bool:
    return any(mixes_positions(part) for part in module.modules() if part is not module)


def _is_container(module: nn.Module) -> bool:
    """Whether a module that takes a mask holds both a mixer and a feed-forward: a block within the block."""
    if _MIXING_CLASS.search(type(module).__name__):
        return False
    children = [child for child in module._modules.values() if child is not None]
    others = [child for child in children if not mixes_positions(child) and not _holds_mixer(child)]
    return len(others) < len(children) and any(len(_matrices(child)) > 1 for child in others)


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [
        value
        for part in module.modules()
        if not is_norm(part)
        for value in part._parameters.values()
        if value is not None and value.ndim > 1
    ]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

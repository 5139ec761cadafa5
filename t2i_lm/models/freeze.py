"""Trainable parameters: named groups to freeze, and the paper's cumulative sets to tune (Figure 5).

Freezing sets `requires_grad` before a strategy wraps the model and before the optimizer is built, so a frozen
parameter has no gradient, no optimizer state and no weight decay. Token rows can be frozen exactly because text and
image rows are separate parameters (`token_rows.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from t2i_lm.models.backbone import Backbone

# Name -> globs over parameter names; `{first}` and `{second}` are the layers of either half.
FREEZE_GROUPS: dict[str, tuple[str, ...]] = {
    "embedding": ("tok_embeddings.*",),
    "output": ("output.*",),
    "norm": ("*norm.*", "*.ln_?.*"),
    "attention": (
        "*.attention.in_proj.*",  # open_lm
        "*.attention.out_proj.*",
        "*.self_attn.*_proj.*",  # transformers: Llama, Qwen, OLMo, Phi, OPT, ...
        "*.attention.query_key_value.*",  # GPT-NeoX, Pythia
        "*.attention.dense.*",
        "*.attn.c_*",  # GPT-2
    ),
    "ffn": ("*.feed_forward.*", "*.mlp.*", "*.fc?.*"),
    "first_half": ("*layers.{first}.*", "*.h.{first}.*"),
    "second_half": ("*layers.{second}.*", "*.h.{second}.*"),
    "text_rows": ("*.text",),
    "image_rows": ("*.image",),
    "position": ("*.wpe.*", "*.embed_positions.*"),  # rotary positions, open_lm's too, have no parameters
}

# Groups that each of the paper's sets tunes, all else frozen. Set (2) names positions too, which have no parameters.
TUNE_SETS: dict[str, tuple[str, ...]] = {
    "embed": ("embedding", "output"),
    "norm": ("embedding", "output", "norm", "position"),
    "first_half": ("embedding", "output", "norm", "position", "first_half"),
    "ffn": ("embedding", "output", "norm", "position", "ffn"),
    "all": tuple(FREEZE_GROUPS),
}


@dataclass(frozen=True)
class GroupSize:
    """Number of parameters of a group, and of trainable ones."""

    name: str
    parameters: int
    trainable: int


def group_members(model: "Backbone", group: str) -> "dict[str, nn.Parameter]":
    """Parameters of a group by name; a tied matrix counts under both its names.

    Raises:
        ValueError: on an unknown group, listing the groups.
    """
    if group not in FREEZE_GROUPS:
        raise ValueError(f"freeze={group!r}: expected one of {', '.join(FREEZE_GROUPS)}")
    named = dict(model.named_parameters(remove_duplicate=False))
    layers = model.config.n_layers
    halves = {"{first}": range(layers // 2), "{second}": range(layers // 2, layers)}
    globs = [
        glob.replace(half, str(layer))
        for glob in FREEZE_GROUPS[group]
        for half, members in halves.items()
        for layer in (members if half in glob else (0,))
    ]
    return {name: value for name, value in named.items() if any(fnmatchcase(name, glob) for glob in globs)}


def _known_members(model: "Backbone", group: str) -> "dict[str, nn.Parameter]":
    members = group_members(model, group)
    if not members and group != "position":
        raise ValueError(f"group {group}: matches no parameter of this backbone")
    return members


def freeze(model: "Backbone", groups: Sequence[str]) -> None:
    """Freezes the union of the groups.

    Raises:
        ValueError: on an unknown group, or if nothing would be left to train.
    """
    members = {group: _known_members(model, group) for group in groups}
    frozen = {id(parameter) for parameters in members.values() for parameter in parameters.values()}
    if all(id(parameter) in frozen or not parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze={', '.join(groups)}: nothing would be left to train")
    for parameter in model.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)


def overlaps(model: "Backbone", groups: Sequence[str]) -> list[str]:
    """One sentence per pair of groups that share parameters."""
    members = {group: group_members(model, group) for group in groups}
    return [
        f"{one} and {two} share {sum(members[one][name].numel() for name in shared):,} parameters: "
        "the union of the groups is frozen"
        for one, two in combinations(members, 2)
        if (shared := members[one].keys() & members[two].keys())
    ]


def tune_only(model: "Backbone", tuned: str) -> None:
    """Freezes everything but one of the paper's sets.

    Raises:
        ValueError: on an unknown set.
    """
    if tuned not in TUNE_SETS:
        raise ValueError(f"tune={tuned!r}: expected one of {', '.join(TUNE_SETS)}")
    if tuned == "all":
        return
    trainable = {id(parameter) for group in TUNE_SETS[tuned] for parameter in _known_members(model, group).values()}
    for parameter in model.parameters():
        if id(parameter) not in trainable:
            parameter.requires_grad_(False)


def group_sizes(model: "Backbone") -> list[GroupSize]:
    """Sizes of all groups, which overlap (a norm is also in a half), and `all` last."""
    members = {group: list(group_members(model, group).values()) for group in FREEZE_GROUPS}
    members["all"] = list(model.parameters())
    return [
        GroupSize(
            name,
            sum(parameter.numel() for parameter in parameters),
            sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        )
        for name, parameters in members.items()
    ]


def group_table(model: "Backbone") -> str:
    """`group_sizes` as text: group, parameters, trainable, share of all parameters."""
    sizes = group_sizes(model)
    total = sizes[-1].parameters
    lines = [f"{'group':<14}{'parameters':>16}{'trainable':>16}{'share':>9}"]
    for size in sizes:
        note = "  (no parameters in this backbone)" if not size.parameters else ""
        share = f"{size.parameters / total:>9.1%}"
        lines.append(f"{size.name:<14}{size.parameters:>16,}{size.trainable:>16,}{share}{note}")
    return "\n".join(lines)

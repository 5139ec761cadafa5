"""Trainable parameters: named groups to freeze, and the paper's cumulative sets to tune (Figure 5).

Freezing sets `requires_grad` before a strategy wraps the model and before the optimizer is built, so a frozen
parameter has no gradient, no optimizer state and no weight decay. Token rows can be frozen exactly because text and
image rows are separate parameters (`token_rows.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from t2i_lm.models.backbone import Backbone
    from t2i_lm.models.parameter_kinds import Place

HALVES = ("first_half", "second_half")
# Name -> whether a parameter belongs to the group, by its place (`parameter_kinds.py`). Each parameter has one kind.
FREEZE_GROUPS: "dict[str, Callable[[Place], bool]]" = {
    "embedding": lambda place: place.kind == "embedding",
    "output": lambda place: place.kind == "output",
    "norm": lambda place: place.kind == "norm",
    "attention": lambda place: place.kind == "attention",
    "ffn": lambda place: place.kind == "ffn",
    "first_half": lambda place: place.half == 1,
    "second_half": lambda place: place.half == 2,
    "text_rows": lambda place: place.rows == "text",
    "image_rows": lambda place: place.rows == "image",
    "position": lambda place: place.kind == "position",  # rotary positions, open_lm's too, have no parameters
}

# The halves of a model with modality experts (`modality_experts.py`), token rows excluded; others have none.
EXPERT_GROUPS: "dict[str, Callable[[Place], bool]]" = {
    "text_expert": lambda place: place.expert == "text",
    "image_expert": lambda place: place.expert == "image",
}
ALL_GROUPS = FREEZE_GROUPS | EXPERT_GROUPS

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
    """Number of parameters of a group, of trainable ones, and of tensors that may or may not belong to it."""

    name: str
    parameters: int
    trainable: int
    doubtful: int = 0


def group_members(model: "Backbone", group: str) -> "dict[str, nn.Parameter]":
    """Parameters of a group by name; a tied matrix counts under both its names.

    Raises:
        ValueError: on an unknown group, listing the groups, or naming a parameter that may or may not belong to it.
    """
    if group not in ALL_GROUPS:
        raise ValueError(f"freeze={group!r}: expected one of {', '.join(ALL_GROUPS)}")
    places = _places(model)
    if doubtful := _doubtful(places, group):
        more = f" and {len(doubtful) - 1} more" if len(doubtful) > 1 else ""
        known = [other for other in FREEZE_GROUPS if not _doubtful(places, other)]
        raise ValueError(
            f"group {group}: the structure of this backbone does not tell whether {doubtful[0]}{more} belongs to it; "
            f"groups that are known: {', '.join(known) or 'none'}"
        )
    return _members(places, group)


def _places(model: "Backbone") -> "list[Place]":
    from t2i_lm.models.parameter_kinds import parameter_places  # imports torch, which commands do late

    return parameter_places(model)


def _members(places: "list[Place]", group: str) -> "dict[str, nn.Parameter]":
    return {place.name: place.parameter for place in places if ALL_GROUPS[group](place)}


def _doubtful(places: "list[Place]", group: str) -> list[str]:
    """Names of the parameters that may or may not belong to a group: without a kind, or shared by both halves."""
    found = [place.name for place in places if group in place.candidates]
    if group in HALVES:
        halves = [_members(places, half) for half in HALVES]
        first, second = ({id(value) for value in half.values()} for half in halves)
        found += [name for name, value in halves[HALVES.index(group)].items() if id(value) in first & second]
    return found


def _known_members(model: "Backbone", group: str) -> "dict[str, nn.Parameter]":
    members = group_members(model, group)
    if not members and group != "position":
        needed = "; it requires modality_experts=true" if group in EXPERT_GROUPS else ""
        raise ValueError(f"group {group}: matches no parameter of this backbone{needed}")
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
    places = _places(model)
    members = {group: list(_members(places, group).values()) for group in ALL_GROUPS}
    members = {group: found for group, found in members.items() if found or group in FREEZE_GROUPS}
    members["all"] = list(model.parameters())
    return [
        GroupSize(
            name,
            sum(parameter.numel() for parameter in parameters),
            sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            len(_doubtful(places, name)) if name in FREEZE_GROUPS else 0,
        )
        for name, parameters in members.items()
    ]


def group_table(model: "Backbone") -> str:
    """`group_sizes` as text: group, parameters, trainable, share of all parameters; a last line on adapters."""
    from t2i_lm.models.lora import coverage

    sizes = group_sizes(model)
    total = sizes[-1].parameters
    lines = [f"{'group':<14}{'parameters':>16}{'trainable':>16}{'share':>9}"]
    for size in sizes:
        note = "  (no parameters in this backbone)" if not size.parameters else ""
        if size.doubtful:
            note = f"  (cannot be frozen or tuned: {size.doubtful} tensors may or may not belong to it)"
        share = f"{size.parameters / total:>9.1%}"
        lines.append(f"{size.name:<14}{size.parameters:>16,}{size.trainable:>16,}{share}{note}")
    adapters = coverage(model)
    return "\n".join(lines if adapters is None else [*lines, adapters])

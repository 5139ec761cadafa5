"""Low-rank adapters (Hu et al., 2021) by `peft` (extra `lora`), on the matrices of a language model's blocks.

Linear layers, those of GPT-2's kind (`Conv1D`) included, and the stacked weights of routed experts get adapters; other
matrices, such as routers held as plain parameters, get none.
"""

import re
import warnings
from typing import Any

from torch import Generator, nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.experts import expert_weights
from t2i_lm.models.parameter_kinds import parameter_places
from t2i_lm.models.token_rows import is_new_row
from t2i_lm.runtime.seeds import seeded

# Of the trainable weights of the blocks: with adapters on less, a run would not be what "LoRA" says.
LEAST_SHARE = 0.5
# Names of matrices listed in a message.
LISTED = 6


def add_adapters(model: Backbone, rank: int, alpha: float, generator: Generator) -> None:
    """Adds an adapter to every trainable linear layer and expert; then only adapters and new token rows are trainable.

    Adapters start at zero, so the model's function is unchanged.

    Args:
        model: expanded, its frozen parameters already chosen.
        rank: of the adapters.
        alpha: their product is scaled by alpha / rank.
        generator: of their initialization.

    Raises:
        ValueError: if peft is not installed, every linear layer is frozen, or most weights would get no adapter.
    """
    peft = _peft()
    layers = [name for name, part in model.named_modules() if _is_linear(part) and part.weight.requires_grad]
    stacked = [weights for weights in expert_weights(model) if weights.is_matrix]
    experts = [weights.name for weights in stacked if weights.parameter.requires_grad]
    if not layers and not experts:
        raise ValueError(
            f"lora.rank={rank}: every linear layer is frozen; LoRA needs at least one trainable linear layer"
        )
    _require_most(model, rank, {*experts, *(f"{name}.weight" for name in layers)})
    new_rows = {name for name, parameter in model.named_parameters() if parameter.requires_grad and is_new_row(name)}
    settings = {"target_parameters": experts} if experts else {}
    with seeded(generator), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft corrects it for a Conv1D
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, **settings)
        peft.inject_adapter_in_model(config, model)
    if experts:
        model.register_load_state_dict_pre_hook(_without_adapted_experts)  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new_rows or ".lora_" in name)


def merge_adapters(model: nn.Module) -> None:
    """Merges every adapter into its layer and restores the names and shapes of the plain model."""
    adapted: dict[str, Any] = {name: part for name, part in model.named_modules() if hasattr(part, "get_base_layer")}
    for part in adapted.values():
        part.merge()
    for name, part in adapted.items():
        parent, _, own = name.rpartition(".")
        if parent not in adapted:  # the adapters of a layer's several parameters are nested
            setattr(model.get_submodule(parent), own, part.get_base_layer())


def coverage(model: Backbone) -> str | None:
    """One line on an adapted model: the share of the blocks' weights with an adapter, and those without any."""
    adapted: list[Any] = [part for part in model.modules() if hasattr(part, "get_base_layer")]
    if not adapted:
        return None
    held = {id(part.get_param() if hasattr(part, "get_param") else part.get_base_layer().weight) for part in adapted}
    matrices = _matrices(model)
    total = sum(value.numel() for value in matrices.values())
    without = {name: value for name, value in matrices.items() if id(value) not in held}
    share = 1 - sum(value.numel() for value in without.values()) / total
    rest = f"; none on {_listed(without)}" if without else ""
    return f"adapters: on {share:.1%} of the {total:,} weights in the matrices of the blocks{rest}"


def _without_adapted_experts(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Completes the state of an earlier version, which gave no adapters to experts: these stay at zero."""
    own = module.state_dict()
    plain = {name: name.replace(".base_layer", "") for name in own if ".base_layer.base_layer." in name}
    if not all(f"{prefix}{name}" in state for name in plain.values()):
        return
    state.update({f"{prefix}{name}": state.pop(f"{prefix}{old}") for name, old in plain.items()})
    experts = tuple({f"{name.split('.base_layer')[0]}." for name in plain})
    added = {f"{prefix}{name}": value for name, value in own.items() if name.startswith(experts) and ".lora_" in name}
    state.update({name: value for name, value in added.items() if name not in state})


def _require_most(model: Backbone, rank: int, adapted: set[str]) -> None:
    trainable = {name: value for name, value in _matrices(model).items() if value.requires_grad}
    without = {name: value for name, value in trainable.items() if name not in adapted}
    total = sum(value.numel() for value in trainable.values())
    left = sum(value.numel() for value in without.values())
    if left > (1 - LEAST_SHARE) * total:
        raise ValueError(
            f"lora.rank={rank}: only {1 - left / total:.1%} of the trainable weights in the matrices of the blocks "
            f"would get an adapter, none of {_listed(without)}; freeze these, or set lora.rank=0"
        )


def _matrices(model: Backbone) -> dict[str, nn.Parameter]:
    """The matrices between embedding and output, adapters excluded, each under one name."""
    others = ("embedding", "output", "norm", "position")
    biases = {id(weights.parameter) for weights in expert_weights(model) if not weights.is_matrix}
    found = {
        id(place.parameter): place
        for place in parameter_places(model)
        if place.kind not in others and place.parameter.ndim > 1 and ".lora_" not in place.name
        if id(place.parameter) not in biases
    }
    return {place.name: place.parameter for place in found.values()}


def _listed(matrices: dict[str, nn.Parameter]) -> str:
    """Names of matrices, those of all layers as one, with their number of weights; the largest first."""
    sizes: dict[str, int] = {}
    for name, value in matrices.items():
        short = re.sub(r"\.\d+\.", ".*.", name.replace(".base_layer", ""))
        sizes[short] = sizes.get(short, 0) + value.numel()
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    more = f" and {len(ordered) - LISTED} more" if len(ordered) > LISTED else ""
    return ", ".join(f"{name} ({size:,})" for name, size in ordered[:LISTED]) + more


def _is_linear(part: nn.Module) -> bool:
    """Whether a module is a linear layer, or transformers' transposed one, whose class is found without an import."""
    own = type(part)
    return isinstance(part, nn.Linear) or (own.__name__ == "Conv1D" and own.__module__ == "transformers.pytorch_utils")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("lora.rank: requires peft, which is not installed: pip install 't2i_lm[lora]'") from error
    return peft

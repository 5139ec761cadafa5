"""Low-rank adapters (Hu et al., 2021) by `peft` (extra `lora`), on every linear layer of a language model."""

from typing import Any

from torch import Generator, nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.token_rows import is_new_row
from t2i_lm.runtime.seeds import seeded


def add_adapters(model: Backbone, rank: int, alpha: float, generator: Generator) -> None:
    """Adds an adapter to every trainable linear layer; then only adapters and new token rows are trainable.

    Adapters start at zero, so the model's function is unchanged.

    Args:
        model: expanded, its frozen parameters already chosen.
        rank: of the adapters.
        alpha: their product is scaled by alpha / rank.
        generator: of their initialization.

    Raises:
        ValueError: if peft is not installed, or every linear layer is frozen.
    """
    peft = _peft()
    layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part.weight.requires_grad]
    if not layers:
        raise ValueError(
            f"lora.rank={rank}: every linear layer is frozen; LoRA needs at least one trainable linear layer"
        )
    new_rows = {name for name, parameter in model.named_parameters() if parameter.requires_grad and is_new_row(name)}
    with seeded(generator):
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new_rows or ".lora_" in name)


def merge_adapters(model: nn.Module) -> None:
    """Merges every adapter into its layer and restores the names and shapes of the plain model."""
    adapted: list[tuple[str, Any]] = [
        (name, part) for name, part in model.named_modules() if hasattr(part, "get_base_layer")
    ]
    for name, part in adapted:
        part.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, part.get_base_layer())


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("lora.rank: requires peft, which is not installed: pip install 't2i_lm[lora]'") from error
    return peft

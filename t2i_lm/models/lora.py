"""Low-rank adapters (Hu et al., 2021) by `peft` (the extra `lora`), on every linear layer of a language model."""

from typing import Any

from torch import Generator, nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.token_rows import is_new_row
from t2i_lm.runtime.seeds import seeded


def add_adapters(model: Backbone, rank: int, alpha: float, generator: Generator) -> None:
    """Puts an adapter beside every linear layer that learns; then only they and the new token rows learn.

    Adapters begin as zero, so the model's function is unchanged. Layers that are frozen already get none.

    Args:
        model: expanded, its trained parameters chosen.
        rank: of the adapters.
        alpha: their product is scaled by alpha / rank.
        generator: of their draw.

    Raises:
        ValueError: if peft is not installed, or no linear layer learns.
    """
    peft = _peft()
    layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part.weight.requires_grad]
    if not layers:
        raise ValueError(f"lora.rank={rank}: no linear layer learns that an adapter could stand beside")
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad and is_new_row(name)}
    with seeded(generator):
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning or ".lora_" in name)


def merge_adapters(model: nn.Module) -> None:
    """Adds every adapter to its layer and removes it: names and shapes are those of the model without any."""
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
        raise ValueError("lora.rank: adapters need peft, which is not installed: pip install 't2i_lm[lora]'") from error
    return peft

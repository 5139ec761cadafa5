"""Float8 products in the layers of a language model by torchao (the extra `fp8`); what is trained stays as it is."""

from torch import nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.fsdp import blocks_of

# What the sizes of a float8 product must be multiples of.
MULTIPLE = 16


def float8_layers(model: Backbone) -> list[str]:
    """Names of the linear layers in the blocks, adapters excluded; token rows and loss are none of them.

    Raises:
        ValueError: if there is none.
    """
    inside = {part for block in blocks_of(model) for part in block.modules()}
    names = [
        name
        for name, part in model.named_modules()
        if part in inside
        and isinstance(part, nn.Linear)
        and ".lora_" not in name
        and part.in_features % MULTIPLE == part.out_features % MULTIPLE == 0
    ]
    if not names:
        raise ValueError(
            f"trainer.fp8=True: expected false, the backbone has no linear layer with multiples of {MULTIPLE} as sizes"
        )
    return names


def multiplies_in_float8(model: nn.Module) -> bool:
    """Whether any layer does."""
    return any(type(part).__name__ == "Float8Linear" for part in model.modules())  # without an import of torchao


def use_float8(model: Backbone, emulate: bool = False) -> None:
    """Lets `float8_layers` multiply in float8, forwards and backwards; parameters keep their names and values.

    Args:
        model: before it is sharded.
        emulate: rounds to float8 and multiplies in the model's own type, which any processor can.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    names = set(float8_layers(model))
    # Padded inside: the gradient of a weight sums over tokens, of which there is any number.
    settings = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in names, config=settings)

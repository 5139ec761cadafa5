"""Float8 matmuls in the linear layers of a language model by torchao (extra `fp8`); parameters stay as they are."""

from torch import nn

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.fsdp import blocks_of

# The sizes of a float8 matmul must be multiples of this.
MULTIPLE = 16


def float8_layers(model: Backbone) -> list[str]:
    """Names of the linear layers in the blocks, adapters excluded; token rows and loss stay as they are.

    Raises:
        ValueError: if there are none.
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
    return any(type(part).__name__ == "Float8Linear" for part in model.modules())  # avoids importing torchao


def use_float8(model: Backbone, emulate: bool = False) -> None:
    """Converts `float8_layers` to float8 matmuls, forward and backward; parameters keep their names and values.

    Args:
        model: not yet sharded.
        emulate: rounds to float8 but multiplies in the model's own dtype, which any processor supports.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    names = set(float8_layers(model))
    # Padded: the gradient of a weight sums over tokens, whose number need not be a multiple.
    settings = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in names, config=settings)

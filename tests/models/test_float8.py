"""Float8 layers (extra `fp8`): their selection, their accuracy, and unchanged weights."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from t2i_lm.config.sections import OptimConfig, TrainerConfig
from t2i_lm.models.float8 import float8_layers, multiplies_in_float8, use_float8
from t2i_lm.models.lora import add_adapters
from t2i_lm.modules.optim import adamw
from t2i_lm.modules.text_to_image import TextToImageModule
from tests.models.test_packing import PLAIN, VARIANTS, batches, make

LINEAR = ("attention.in_proj", "attention.out_proj", "feed_forward.w12", "feed_forward.w3")


def converted(model: nn.Module) -> set[str]:
    return {name for name, part in model.named_modules() if type(part).__name__ == "Float8Linear"}


def test_float8_layers_are_the_linear_layers_of_the_blocks() -> None:
    decoder, _ = make(VARIANTS[0])
    assert float8_layers(decoder) == [f"layers.{layer}.{name}" for layer in range(3) for name in LINEAR]


def test_a_backbone_without_suitable_layers_is_refused() -> None:
    decoder, _ = make(VARIANTS[0])
    for block in decoder.layers:
        block.attention, block.feed_forward = nn.Identity(), nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"trainer\.fp8=True: expected false, the backbone has no linear layer"):
        float8_layers(decoder)


def test_a_step_is_close_to_float32_and_its_weights_load_into_a_plain_decoder() -> None:
    """The loss is within 2 % of float32 (measured: 0.6 % at the first step, 1.0 % after it)."""
    pytest.importorskip("torchao")
    decoder, layout = make(VARIANTS[0])
    module = TextToImageModule(decoder, PLAIN, layout)
    plain = copy.deepcopy(module)
    names = list(decoder.state_dict())
    use_float8(decoder, emulate=True)
    assert converted(decoder) == set(float8_layers(decoder)) == set(float8_layers(plain.decoder))
    assert list(decoder.state_dict()) == names
    ids_BT = batches(layout)[0]
    totals: list[Tensor] = []
    for each in (module, plain):
        optimizer = adamw(list(each.named_parameters()), OptimConfig(lr=1e-3))
        for _ in range(2):
            totals.append(each.sums(ids_BT)[0])
            optimizer.zero_grad()
            totals[-1].backward()
            optimizer.step()
    low, low_after, exact, exact_after = (total.item() for total in totals)
    assert low != exact
    assert exact_after < 0.9 * exact
    assert low == pytest.approx(exact, rel=2e-2)
    assert low_after == pytest.approx(exact_after, rel=2e-2)
    plain.load_state_dict(module.state_dict())
    assert not converted(plain)
    assert plain.sums(ids_BT)[0].item() == pytest.approx(module.sums(ids_BT)[0].item(), rel=2e-2)


def test_only_training_enables_float8() -> None:
    pytest.importorskip("torchao")
    decoder, layout = make(VARIANTS[0])
    module = TextToImageModule(decoder, replace(PLAIN, trainer=TrainerConfig(fp8=True)), layout)
    assert not converted(decoder)
    assert not multiplies_in_float8(decoder)
    for _ in range(2):  # training and validation
        module.configure_model()
        assert multiplies_in_float8(decoder)
        assert converted(decoder) == set(float8_layers(decoder))


def test_adapters_stay_in_full_precision() -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("peft")
    decoder, _ = make(VARIANTS[0])
    add_adapters(decoder, 16, 4.0, torch.Generator())
    use_float8(decoder, emulate=True)
    assert converted(decoder) == {f"layers.{layer}.{name}.base_layer" for layer in range(3) for name in LINEAR}

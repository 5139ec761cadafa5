"""Images as functions of prompt and seed, in any batch."""

import numpy as np
import pytest
import torch

from t2i_lm.generation.images import (
    caption_prompts,
    generate_codes,
    numerics,
    prepare_generation,
    require_fitting,
)
from t2i_lm.runtime.devices import missing_to_compile
from t2i_lm.tokenizers.layout import Layout
from tests.decoders import image_model


def test_a_few_images_are_not_compiled_for_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Compilation takes longer than it saves."""
    model = image_model()
    prepare_generation(model, bf16=False, compiled=True, images=5)
    assert not numerics(model)["compiled"]
    message = capsys.readouterr().err
    assert "--compile: nothing is compiled: on a CPU it saves time from about" in message
    enough = int(message.split("from about ")[1].split(" images")[0].replace(",", ""))
    prepare_generation(model, bf16=False, compiled=True, images=enough - 1)
    assert not numerics(model)["compiled"]
    capsys.readouterr()
    prepare_generation(model, bf16=False, compiled=True, images=enough)  # compiles at its first call
    compiler = not missing_to_compile()
    assert numerics(model)["compiled"] == compiler
    assert (capsys.readouterr().err == "") == compiler


def test_space_around_a_caption_does_not_count_as_in_training() -> None:
    """Training captions have none: with it, the last id of the prompt would be one that no caption ends with."""
    model = image_model()
    plain, *spaced = caption_prompts(model, ["a red ring", "a red ring ", " a red ring\n"])
    assert all(torch.equal(prompt_T, plain) for prompt_T in spaced)
    longest = "a red ring" * 20
    while len(model.text.encode(longest)) > model.layout.text_budget:  # at the limit
        longest = longest[:-1]
    require_fitting(model, [f" {longest}\n\n"])


def test_rounded_weights_sample_the_same_codes_in_any_batch() -> None:
    """Captions of several lengths."""
    model = image_model()
    layout = model.layout
    assert isinstance(layout, Layout)
    prepare_generation(model, bf16=True, compiled=False, images=1)
    prompts = [torch.from_numpy(layout.prompt(np.arange(5 * number % 31))) for number in range(10)]
    together = generate_codes(model, prompts, range(10))
    for first, last in ((0, 1), (1, 3), (3, 8), (9, 10)):
        assert torch.equal(generate_codes(model, prompts[first:last], range(first, last)), together[first:last])

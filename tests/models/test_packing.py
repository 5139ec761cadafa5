"""Packed sequences give the loss and gradients of the padded batch, for all decoder variants and losses."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig, DistilConfig, LossConfig
from t2i_lm.models.decoder import Decoder, attend, attend_packed
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.open_lm import decoder_config
from t2i_lm.models.packing import Packed
from t2i_lm.modules.base import DecoderModule
from t2i_lm.modules.distillation import DistilledModule
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.modules.unconditional import UnconditionalImageModule
from t2i_lm.storage.run_folder import Run
from t2i_lm.tokenizers.layout import ImageLayout, Layout
from tests.runs import PRETRAINED, same_losses, train

TEXT, IMAGES, LENGTH = 50, 12, 24
WIDE = {"hidden_dim": 64, "n_layers": 3, "n_heads": 4, "seq_len": LENGTH, "vocab_size": TEXT}
VARIANTS: list[dict[str, Any]] = [
    {"positional_embedding_type": "rotary"},
    {"positional_embedding_type": "llama_rotary", "qk_norm": True, "model_norm": "rms_norm"},
    {"positional_embedding_type": "head_rotary", "qk_norm": True, "post_embed_norm": True},
    {"positional_embedding_type": "none", "weight_tying": True, "ffn_type": "gemma_geglu"},
]
PLAIN = ExperimentConfig(data=DataConfig(length=LENGTH))
WEIGHTED = ExperimentConfig(data=DataConfig(length=LENGTH), loss=LossConfig(text_weight=0.3, image_weight=2.0, z=1e-2))


def make(variant: dict[str, Any]) -> tuple[Decoder, Layout]:
    decoder = Decoder(decoder_config(WIDE | variant))
    decoder.reset_parameters(torch.Generator().manual_seed(1))
    vocab = expand_vocabulary(decoder, IMAGES, torch.Generator().manual_seed(2))
    return decoder, Layout(vocab, 4, LENGTH)


def batches(layout: Layout) -> list[Tensor]:
    """Ragged, of maximal length, without pads, and of a single sequence."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for sizes in ([5, 8, 0], [14, 1], [3, 3], [6]):
        texts = [torch.randint(3, TEXT, (size,), generator=generator).numpy() for size in sizes]
        ids_BT = layout.pack(texts, torch.randint(IMAGES, (len(sizes), 4), generator=generator).numpy())
        found.append(ids_BT if max(sizes) != 3 else ids_BT[:, :13])
    return found


def assert_equal(module: DecoderModule, batches: list[Tensor]) -> None:
    """Packing changes neither sums nor gradients, up to float32 rounding."""
    packed = copy.deepcopy(module)
    packed.decoder.enable_packing()
    for ids_BT in batches:
        results = []
        for each in (module, packed):
            each.zero_grad()
            total, nll_M, count_M = each.sums(ids_BT)
            total.backward()
            gradients = {name: p.grad for name, p in each.decoder.named_parameters() if p.grad is not None}
            results.append((total, nll_M, count_M, gradients))
        (total, nll_M, count_M, gradients), (other, other_nll_M, other_count_M, others) = results
        assert other.item() == pytest.approx(total.item(), rel=1e-6)
        assert torch.allclose(other_nll_M, nll_M, rtol=1e-6)
        assert torch.equal(other_count_M, count_M)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (others[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant["positional_embedding_type"])
@pytest.mark.parametrize("config", [PLAIN, WEIGHTED], ids=["plain", "weighted"])
def test_loss_and_gradients_equal_the_padded_batch(variant: dict[str, Any], config: ExperimentConfig) -> None:
    decoder, layout = make(variant)
    assert_equal(TextToImageModule(decoder, config, layout), batches(layout))


def test_an_image_loss_ignores_positions_after_its_last_target() -> None:
    decoder, pairs = make(VARIANTS[0])
    layout = ImageLayout(pairs.vocab, 4)
    ids_BT = layout.pack([], torch.arange(8).view(2, 4).numpy())
    assert_equal(
        UnconditionalImageModule(decoder, ExperimentConfig(task="unconditional", loss_rows="image"), layout), [ids_BT]
    )


def test_packing_leaves_a_distilled_model_unchanged() -> None:
    decoder, layout = make(VARIANTS[0])
    config = ExperimentConfig(data=DataConfig(length=LENGTH), distil=DistilConfig(weight=0.7))
    module = DistilledModule(decoder, config, layout, document_start=2)
    with torch.no_grad():
        for parameter in module.decoder.parameters():
            parameter.mul_(1.1)
    assert_equal(module, batches(layout))


def test_packing_works_with_activation_checkpointing() -> None:
    decoder, layout = make(VARIANTS[0])
    decoder.enable_activation_checkpointing()
    assert_equal(TextToImageModule(decoder, PLAIN, layout), batches(layout))


def test_layers_compute_only_the_tokens_that_targets_depend_on() -> None:
    (decoder, _), seen = make(VARIANTS[0]), []
    decoder.enable_packing()
    decoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    mask_BT = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]).bool()
    ids_BT = torch.arange(15).view(3, 5)
    x_ND = decoder.hidden_at(ids_BT, decoder.target_index(mask_BT))
    assert seen == [(1, 4 + 0 + 2, 64)]
    assert torch.allclose(x_ND, decoder.hidden(ids_BT)[mask_BT], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("multiple", [1, 32])
def test_a_packed_run_equals_the_padded_run(pretrained: Run, tiny: list[str], tmp_path: Path, multiple: int) -> None:
    keys = ("trainer.packing=true", f"data.pad_to_multiple_of={multiple}", "samples.prompts=0")
    run = train(PRETRAINED, tmp_path, *tiny, *keys)
    same_losses(run, pretrained, 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_packed_attention_kernel_equals_padded_attention() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    length_B1 = torch.tensor([[7], [300], [0], [64]], device="cuda")
    packed = Packed.from_mask(torch.arange(300, device="cuda") < length_B1)
    shape = (1, 4, 371, 64)
    q, k, v = (torch.randn(shape, generator=generator, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    out = attend_packed(q, k, v, packed)
    padded = [packed.pad(x.float()) for x in (q, k, v)]
    expected = packed.unpad(attend(padded[0], padded[1], padded[2], causal=True))
    assert (out - expected).norm() <= 1e-2 * expected.norm()
    inputs = (q, k, v)
    pairs = zip(*(torch.autograd.grad(y.sum(), inputs) for y in (out, expected)), strict=True)
    assert all((one - two).norm() <= 2e-2 * two.norm() for one, two in pairs)

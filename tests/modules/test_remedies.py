"""Effect of each remedy on loss, gradient and update, against a computation by hand."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig, DistilConfig, LossConfig, OptimConfig
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.modules.distillation import DistilledModule
from t2i_lm.modules.optim import OPTIMIZERS
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.tokenizers.layout import BOUNDARY, Layout
from tests.decoders import tiny_decoder

TEXT, IMAGES, LENGTH, END = 50, 12, 20, 2


def make(config: ExperimentConfig, distilled: bool = False) -> tuple[TextToImageModule, Layout]:
    decoder = tiny_decoder(seed=1, seq_len=LENGTH, vocab_size=TEXT)
    vocab = expand_vocabulary(decoder, IMAGES, torch.Generator().manual_seed(2))
    layout = Layout(vocab, 4, LENGTH)
    if distilled:
        return DistilledModule(decoder, config, layout, END), layout
    return TextToImageModule(decoder, config, layout), layout


def batch(layout: Layout, replay: bool) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, TEXT, (size,), generator=generator).numpy() for size in (5, 8, 0)]
    pairs_BT = layout.pack(texts, torch.randint(IMAGES, (3, 4), generator=generator).numpy())
    plain_BT = torch.randint(3, TEXT, (1, LENGTH), generator=generator)
    return torch.cat([pairs_BT[:2], plain_BT, pairs_BT[2:]]) if replay else pairs_BT


def gradients(module: TextToImageModule, total: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in module.decoder.named_parameters() if p.grad is not None}


def test_weights_scale_each_modality_in_the_gradient_and_not_in_the_report() -> None:
    data = DataConfig(length=LENGTH, batch_size=4, replay_ratio=0.25)
    weighted = LossConfig(text_weight=0.5, image_weight=2.0, replay_weight=3.0)
    module, layout = make(ExperimentConfig(data=data, loss=weighted))
    plain, _ = make(ExperimentConfig(data=data))
    ids_BT = batch(layout, replay=True)
    assert module.modalities == ("text", "image", "boundary", "replay")
    total, nll_M, count_M = module.sums(ids_BT)
    _, plain_nll_M, plain_count_M = plain.sums(ids_BT)
    assert torch.equal(nll_M, plain_nll_M)
    assert torch.equal(count_M, plain_count_M)
    assert count_M.tolist() == [13, 12, 15, LENGTH - 1]
    assert total.item() == pytest.approx(float(nll_M @ torch.tensor([0.5, 2.0, 1.0, 3.0]).double()), rel=1e-5)
    # By hand: plain softmax cross-entropy, each target times its weight.
    with torch.enable_grad():
        logits_BTV = plain.decoder(ids_BT[:, :-1])
        class_BT, valid_BT = module.classify(ids_BT[:, 1:])
        nll_N = -logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0][valid_BT]
        by_hand = (nll_N * torch.tensor([0.5, 2.0, 1.0, 3.0])[class_BT[valid_BT]]).sum()
    expected = gradients(plain, by_hand)
    for name, grad in gradients(module, total).items():
        assert (grad - expected[name]).abs().max() <= 3e-6 * expected[name].abs().max(), name


def test_a_masked_caption_has_no_gradient_through_its_own_targets() -> None:
    module, layout = make(ExperimentConfig(loss=LossConfig(text_weight=0.0)))
    module.training_step({"ids_BT": batch(layout, False), "tokens_nominal": 60, "samples": 3, "tokens_real": 0}, 0)
    assert module._step_count is not None
    assert int(module._step_count) == 12 + 15  # the mean is over trained targets
    config = ExperimentConfig()
    assert make(config)[0].weight_M is None


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_l2_sp_is_weight_decay_on_the_distance_from_the_start(name: str) -> None:
    """Moved so that the start is the origin, a step of AdamW with decay is a step of L2-SP."""
    optim = OptimConfig(name=name, lr=0.01, weight_decay=0.1, l2_sp=0.3, grad_clip=1e9)
    module, _ = make(ExperimentConfig(optim=optim))
    assert module.anchor is not None
    optimizer = OPTIMIZERS[name](list(module.named_parameters()), optim)
    start = copy.deepcopy(module.decoder)
    origin, _ = make(ExperimentConfig())
    with torch.no_grad():
        for parameter in origin.decoder.parameters():
            parameter.zero_()
    other = OPTIMIZERS[name](list(origin.named_parameters()), replace(optim, l2_sp=0.0, weight_decay=0.3))
    generator = torch.Generator().manual_seed(7)
    for _ in range(5):
        for mine, moved in zip(module.decoder.parameters(), origin.decoder.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            moved.grad = mine.grad.clone()
        module._step_count = torch.tensor(module.config.data.batch_size * module.nominal_length)
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        other.step()
    for (key, mine), first, moved in zip(
        module.decoder.named_parameters(), start.parameters(), origin.decoder.parameters(), strict=True
    ):
        if not key.endswith((".special", ".image")):
            assert torch.allclose(mine - first, moved, atol=2e-6), key
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert "anchor" not in " ".join(module.state_dict())


def test_a_skipped_step_pulls_nothing() -> None:
    module, _ = make(ExperimentConfig(optim=OptimConfig(l2_sp=1.0)))
    assert module.anchor is not None
    optimizer = OPTIMIZERS["adamw"](list(module.named_parameters()), module.config.optim)
    with torch.no_grad():
        module.decoder.norm.weight.add_(1.0)
    module.decoder.norm.weight.grad = torch.zeros_like(module.decoder.norm.weight)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    module.anchor.pull(optimizer)
    assert torch.equal(module.decoder.norm.weight, torch.full((32,), 2.0))
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    module.anchor.pull(optimizer)
    assert torch.allclose(module.decoder.norm.weight, torch.full((32,), 2.0 - 3e-4))


@pytest.mark.parametrize("replay", [False, True])
def test_distillation_compares_text_targets_with_the_initial_model(replay: bool) -> None:
    data = DataConfig(length=LENGTH, batch_size=4, replay_ratio=0.25 if replay else 0.0)
    module, layout = make(ExperimentConfig(data=data, distil=DistilConfig(weight=0.7)), distilled=True)
    initial = copy.deepcopy(module.decoder)
    with torch.no_grad():
        for parameter in module.decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.1)
    ids_BT = batch(layout, replay)
    expected = 0.0
    for ids_T in ids_BT:
        own_TV = module.decoder(ids_T[None, :-1])[0, :, :TEXT].log_softmax(-1)
        if ids_T[0] < TEXT:
            read_T, places = ids_T[:-1], range(LENGTH - 1)
            teacher_TV = initial(read_T[None])[0, :, :TEXT].log_softmax(-1)
        else:
            caption = ids_T[2 : 2 + int((ids_T < TEXT).sum())]
            teacher_TV = initial(torch.cat([torch.tensor([END]), caption])[None])[0, :, :TEXT].log_softmax(-1)
            places = range(1, 1 + len(caption))  # the input there is <text>, then the caption's ids
        for row, place in enumerate(places):
            expected += float((teacher_TV[row].exp() * (teacher_TV[row] - own_TV[place])).sum().detach())
    total, nll_M, _ = module.sums(ids_BT)
    assert total.item() == pytest.approx(float(nll_M.sum()) + 0.7 * expected, rel=1e-4)
    total.backward()
    assert all(parameter.grad is None for parameter in module._teacher[0].parameters())
    with torch.no_grad():
        assert module.sums(ids_BT)[0].item() == pytest.approx(float(nll_M.sum()), rel=1e-5)
    assert not any("teacher" in name for name in module.state_dict())


def test_distillation_from_itself_costs_nothing_on_plain_text() -> None:
    data = DataConfig(length=LENGTH, batch_size=4, replay_ratio=0.25)
    module, layout = make(ExperimentConfig(data=data, distil=DistilConfig(weight=1.0)), distilled=True)
    ids_BT = batch(layout, replay=True)[2:3]
    class_BT, _ = module.classify(ids_BT[:, 1:])
    assert bool((class_BT != BOUNDARY).all())
    total, nll_M, _ = module.sums(ids_BT)
    assert total.item() == pytest.approx(float(nll_M.sum()), rel=1e-6)

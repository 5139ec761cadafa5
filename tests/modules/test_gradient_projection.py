"""Projection of conflicting gradients against a computation by hand and with accumulation.

Over processes: `tests/training/test_remedies_together.py`.
"""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig, DistilConfig, LossConfig, OptimConfig, TrainerConfig
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.modules.distillation import DistilledModule
from t2i_lm.modules.gradient_projection import GradientProjection, ProjectedDistilledModule, ProjectedModule
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.tokenizers.layout import Layout
from tests.decoders import tiny_decoder
from tests.modules.test_remedies import END, IMAGES, LENGTH, TEXT, batch

WEIGHTED = LossConfig(text_weight=0.5, image_weight=2.0, replay_weight=3.0)


def make(kind: type, accumulate: int = 1, packing: bool = False) -> TextToImageModule:
    config = ExperimentConfig(
        data=DataConfig(length=LENGTH, batch_size=4, replay_ratio=0.25),
        loss=WEIGHTED,
        optim=OptimConfig(gradient_projection=issubclass(kind, ProjectedModule), grad_clip=1e9),
        distil=DistilConfig(weight=0.7 if issubclass(kind, DistilledModule) else 0.0),
        trainer=TrainerConfig(accumulate_grad_batches=accumulate),
    )
    decoder = tiny_decoder(seed=1, seq_len=LENGTH, vocab_size=TEXT)
    vocab = expand_vocabulary(decoder, IMAGES, torch.Generator().manual_seed(2))
    if packing:
        decoder.enable_packing()
    more = (END,) if issubclass(kind, DistilledModule) else ()
    module = kind(decoder, config, Layout(vocab, 4, LENGTH), *more)
    if issubclass(kind, DistilledModule):  # away from the initial model, whose divergence is 0
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.1)
    assert isinstance(module, TextToImageModule)
    return module


def ids_of(module: TextToImageModule) -> Tensor:
    return batch(module.layout, replay=True)


def entry(ids_BT: Tensor) -> dict[str, Any]:
    return {"ids_BT": ids_BT, "samples": len(ids_BT), "tokens_nominal": ids_BT.numel(), "tokens_real": 0}


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def by_hand(first: Tensor, second: Tensor) -> Tensor:
    """Algorithm 1 of Yu et al. for two tasks."""
    dot = first @ second
    if dot >= 0:
        return first + second
    return (first - dot / (second @ second) * second) + (second - dot / (first @ first) * first)


def step(module: TextToImageModule, micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The gradients of an optimizer step, as Lightning computes them."""
    outputs = []

    def closure() -> None:
        for one in micro_batches:
            made = module.training_step(module.on_before_batch_transfer(one, 0), 0)
            outputs.append(made)
            (made["loss"] / len(micro_batches)).backward()

    class Probe(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return closure()

    module.optimizer_step(0, 0, Probe(module.parameters(), 0.1), closure)
    return outputs


@pytest.mark.parametrize("kind", [ProjectedModule, ProjectedDistilledModule])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_gradient_is_that_of_pcgrad(kind: type, packing: bool) -> None:
    module = make(kind, packing=packing)
    ids_BT = ids_of(module)
    plain = make(DistilledModule if issubclass(kind, DistilledModule) else TextToImageModule)
    (reported,) = step(module, [entry(ids_BT)])
    plain_B = torch.tensor([False, False, True, False])
    parts = []
    for chosen_B in (~plain_B, plain_B):
        plain.zero_grad()
        plain.sums(ids_BT[chosen_B])[0].backward()
        parts.append(flat([p.grad for p in plain.decoder.parameters() if p.grad is not None]) / ids_BT.numel())
    found = flat([p.grad for p in module.decoder.parameters() if p.grad is not None])
    expected = by_hand(*parts)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    total, nll_M, count_M = plain.sums(ids_BT)
    assert reported["loss"].item() == pytest.approx(total.item() / ids_BT.numel(), rel=1e-5)
    assert torch.allclose(reported["nll_sum"], nll_M)
    assert torch.equal(reported["count"], count_M)
    assert module._step_count is not None
    assert int(module._step_count) == int(count_M.double() @ torch.tensor([0.5, 2.0, 1.0, 3.0]).double())
    cosine = float(parts[0] @ parts[1] / parts[0].norm() / parts[1].norm())
    assert isinstance(module, ProjectedModule)
    assert module.scalars()["gradient_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert ("distil_kl" in module.scalars()) == issubclass(kind, DistilledModule)


def test_accumulation_projects_the_gradients_of_the_whole_step() -> None:
    """Of micro-batches with and without text; the second step starts anew."""
    whole, cut = make(ProjectedModule), make(ProjectedModule, accumulate=2)
    ids_BT = ids_of(whole)
    micro = [entry(ids_BT[:2]), entry(ids_BT[2:])]
    for _ in range(2):
        whole.zero_grad()
        cut.zero_grad()
        step(whole, [entry(ids_BT)])
        step(cut, micro)
        for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, atol=1e-7)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_only_conflicts_are_projected(sign: float) -> None:
    layer = nn.Linear(3, 2, bias=False)
    first, second = torch.tensor([1.0, 2.0, 0.5]), sign * torch.tensor([2.0, 0.1, 1.0])
    projection = GradientProjection(layer)
    for part in (0.25, 0.75):
        projection.add((layer(part * second)).sum())
    layer(first).sum().backward()
    projection.combine()
    both = [gradient.repeat(2).double() for gradient in (first, second)]
    assert layer.weight.grad is not None
    assert torch.allclose(layer.weight.grad.flatten().double(), by_hand(*both), atol=1e-6)
    layer.zero_grad()
    projection.combine()  # nothing was added since
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


@pytest.mark.filterwarnings("ignore")
def test_lightning_calls_nothing_between_the_backward_pass_and_the_projection() -> None:
    """The guard of non-finite gradients and clipping see the combined gradient."""
    module = make(ProjectedModule)
    ids_BT = ids_of(module)
    seen: list[Tensor] = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append(flat([p.grad.clone() for p in pl_module.decoder.parameters() if p.grad is not None]))

    loader: Any = torch.utils.data.DataLoader([entry(ids_BT)], batch_size=None)
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        callbacks=[Look()],
        gradient_clip_val=1e9,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)
    other = make(ProjectedModule)
    step(other, [entry(ids_BT)])
    expected = flat([p.grad for p in other.decoder.parameters() if p.grad is not None])
    assert torch.allclose(seen[0], expected, rtol=1e-5, atol=1e-9)

"""Cosine of gradients, against two backward passes by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_lm.analysis.base import NotAvailableError
from t2i_lm.analysis.gradients import _draw, gradient_agreement, trainable_groups
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.freeze import freeze
from t2i_lm.plots.panels import arm_style
from t2i_lm.tokenizers.layout import IMAGE, TEXT, Layout, modality_of_target
from tests.decoders import tiny_decoder


def expanded(**changes: object) -> tuple[Decoder, list[tuple[Tensor, Tensor]]]:
    decoder = tiny_decoder(**changes).eval()
    vocab = expand_vocabulary(decoder, 8, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    layout = Layout(vocab, 4, 16)
    batches = []
    for _ in range(3):
        texts = [torch.randint(50, (5,), generator=generator).numpy() for _ in range(2)]
        ids_BT = layout.pack(texts, torch.randint(8, (2, 4), generator=generator).numpy())
        batches.append((ids_BT, modality_of_target(ids_BT[:, 1:], vocab)))
    return decoder, batches


def by_hand(decoder: Decoder, ids_BT: Tensor, modality_BT: Tensor, name: str) -> list[Tensor]:
    gradients = []
    for modality in (TEXT, IMAGE):
        decoder.zero_grad()
        loss_BT = F.cross_entropy(decoder(ids_BT[:, :-1]).transpose(1, 2), ids_BT[:, 1:], reduction="none")
        loss_BT[modality_BT == modality].mean().backward()
        gradients.append(dict(decoder.named_parameters())[name].grad.clone().flatten().double())
    decoder.zero_grad()
    return gradients


@pytest.mark.parametrize(
    ("group", "name"),
    [("layer 2.attention", "layers.1.attention.out_proj.weight"), ("layer 1.ffn", "layers.0.feed_forward.w12.weight")],
)
def test_cosine_and_ratio_are_those_of_two_backward_passes(group: str, name: str) -> None:
    decoder, batches = expanded()
    for other, parameter in decoder.named_parameters():  # the group is then this parameter alone
        parameter.requires_grad_(other == name or other == "norm.weight")
    found = gradient_agreement(decoder, batches)
    for parameter in decoder.parameters():
        parameter.requires_grad_(True)
    pairs = [by_hand(decoder, ids_BT, modality_BT, name) for ids_BT, modality_BT in batches]
    cosines = torch.stack([torch.cosine_similarity(pair[0], pair[1], dim=0) for pair in pairs])
    ratios = torch.stack([text.norm() / image.norm() for text, image in pairs])
    agreement = found[group]
    assert agreement.cosine.value == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert agreement.cosine.se == pytest.approx(cosines.std().item() / math.sqrt(3), rel=1e-3)
    assert agreement.cosine.n == 3
    assert agreement.ratio.value == pytest.approx(ratios.mean().item(), rel=1e-4)
    mean = [sum(pair[number] for pair in pairs) for number in (0, 1)]
    assert agreement.of_mean.cosine == pytest.approx(torch.cosine_similarity(mean[0], mean[1], dim=0).item(), abs=1e-5)
    assert set(found) == {"all", "norm", group, group.partition(".")[2]}


def test_every_trainable_parameter_is_in_one_kind_and_leaves_no_gradient_behind() -> None:
    decoder, batches = expanded()
    found = gradient_agreement(decoder, batches[:1])
    kinds = {name: one.parameters for name, one in found.items() if name != "all" and not name.startswith("layer ")}
    assert set(kinds) == {"embedding", "output", "norm", "attention", "ffn"}
    assert sum(kinds.values()) == found["all"].parameters == sum(p.numel() for p in decoder.parameters())
    assert math.isnan(found["all"].cosine.se)  # of one batch
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_tied_rows_are_counted_once_and_frozen_ones_are_left_out() -> None:
    decoder, batches = expanded(weight_tying=True)
    assert not any("output" in groups for groups in trainable_groups(decoder).values())
    decoder.tok_embeddings.text.requires_grad_(False)
    assert "tok_embeddings.text" not in trainable_groups(decoder)
    assert gradient_agreement(decoder, batches[:1])["embedding"].parameters == 15 * 32


def test_without_text_targets_there_is_no_text_loss() -> None:
    decoder, ((ids_BT, modality_BT), *_) = expanded()
    with pytest.raises(NotAvailableError, match="no text targets"):
        gradient_agreement(decoder, [(ids_BT, modality_BT.clamp(min=IMAGE))])


@pytest.mark.parametrize(
    ("frozen", "layers"),
    [
        ([], ["1", "2", "1", "2"]),
        (["first_half"], ["2", "2"]),
        (["attention"], ["1", "2"]),
        (["ffn"], ["1", "2"]),
        (["attention", "ffn"], []),
    ],
)
def test_the_figure_has_a_column_for_every_layer_that_is_trained(frozen: list[str], layers: list[str]) -> None:
    decoder, batches = expanded()
    freeze(decoder, frozen)
    found = gradient_agreement(decoder, batches[:2])
    run: Any = SimpleNamespace(label="pretrained", look=arm_style("pretrained"))  # all that is drawn of a run
    figure = _draw([run], {"pretrained": {"initial": found, "trained": found}}, "")
    axes = figure.axes[1]
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert [tick for tick in ticks if tick.isdigit()] == layers
    said = {text.get_text() for text in axes.texts}
    kinds = {"attention": "attention", "ffn": "feed-forward"}
    assert said == {f"{name}, by layer" for kind, name in kinds.items() if kind not in frozen}

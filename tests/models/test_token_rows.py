"""Logits and losses of odd numbers of rows are those of padded ones."""

from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

import t2i_lm.models.padded_rows as padded_rows
from t2i_lm.evaluation.probes.scores import score_targets
from t2i_lm.models.cross_entropy import torch_linear_cross_entropy
from t2i_lm.models.token_rows import Output
from tests.marks import needs_torchs
from tests.models.test_freeze import expanded


def output(bias: bool) -> Output:
    """61 text, 7 special and 33 image rows of width 16."""
    generator = torch.Generator().manual_seed(0)
    rows = Output(61, 16)
    for name, count in (("text", 61), ("special", 7), ("image", 33)):
        setattr(rows, name, nn.Parameter(torch.randn(count, 16, generator=generator)))
    if bias:
        rows.bias = nn.Parameter(torch.randn(61, generator=generator))
    return rows


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("image_rows_only", [False, True])
def test_logits_loss_and_gradients_are_those_without_pads(
    image_rows_only: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = output(bias)
    x_BTD = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    target_N = torch.tensor([68, 100, 90, 68, 71, 99, 80, 85, 100, 70])

    def values() -> list[Tensor]:
        rows.zero_grad()
        loss = rows.loss(x_BTD.flatten(0, 1), target_N, image_rows_only)
        torch.autograd.backward(loss.total)
        grads = [parameter.grad for parameter in rows.parameters() if parameter.grad is not None]
        logits_BTV = rows(x_BTD, image_rows_only)
        torch.autograd.backward(logits_BTV.square().sum())
        more = [parameter.grad for parameter in rows.parameters() if parameter.grad is not None]
        return [logits_BTV.detach(), loss.nll_N, *grads, *more]

    expected = values()
    assert expected[0].shape == (2, 5, 33 if image_rows_only else 101)
    monkeypatch.setattr(padded_rows, "DEVICES", {"cpu"})
    found = values()
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert own.shape == other.shape
        assert (own - other).norm() <= 1e-6 * other.norm()


@needs_torchs
def test_torchs_backend_counts_no_pad_as_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, x_ND, target_N = output(True), torch.randn(4, 16), torch.tensor([0, 61, 68, 100])
    expected = rows.loss(x_ND, target_N)
    monkeypatch.setattr(padded_rows, "DEVICES", {"cpu"})
    found = rows.loss(x_ND, target_N, backend=torch_linear_cross_entropy)
    torch.testing.assert_close(found.nll_N, expected.nll_N)


def test_probes_score_targets_as_without_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, ids_BT = expanded(), torch.arange(40).view(2, 20) * 2
    target_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    target_BT[:, 0] = False
    expected = score_targets(decoder, ids_BT, target_BT)
    assert len(decoder.output.matrix()) % 64
    monkeypatch.setattr(padded_rows, "DEVICES", {"cpu"})
    for own, other in zip(score_targets(decoder, ids_BT, target_BT), expected, strict=True):
        torch.testing.assert_close(own, other)


def test_a_padded_decoder_has_the_parameters_of_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = expanded()
    monkeypatch.setattr(padded_rows, "DEVICES", {"cpu"})
    padded = expanded()
    ids_BT = torch.arange(20).view(1, 20)
    torch.autograd.backward(padded.loss(ids_BT, ids_BT).total)
    assert asdict(padded.config) == asdict(plain.config)
    for (name, own), (_, other) in zip(padded.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(own, other), name
    assert all(p.grad is not None and p.grad.shape == p.shape for p in padded.parameters())

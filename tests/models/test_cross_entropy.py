"""Values and gradients of the fused loss against materialized logits, chunked and whole."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import t2i_lm.models.cross_entropy as losses
import t2i_lm.models.padded_rows as padded_rows
from t2i_lm.config.sections import LOSS_BACKENDS
from t2i_lm.models.cross_entropy import BACKENDS, TokenLoss, chunk_size, loss_backend
from tests.marks import needs_torchs

Backend = Callable[..., TokenLoss]


@pytest.fixture(params=["fused", pytest.param("torch", marks=needs_torchs)])
def linear_cross_entropy(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


@pytest.fixture(params=[False, True], ids=["unpadded", "padded"])
def padded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows padded on this CPU as on CUDA."""
    monkeypatch.setattr(padded_rows, "DEVICES", {"cpu"} if request.param else set())


def inputs(targets: int = 50, dim: int = 24, vocabulary: int = 90) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(targets, dim, generator=generator).requires_grad_()
    weight_VD = torch.randn(vocabulary, dim, generator=generator).requires_grad_()
    target_N = torch.randint(vocabulary, (targets,), generator=generator)
    return x_ND, weight_VD, target_N, torch.rand(targets, generator=generator)


def materialized(
    x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, token_weight_N: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    logits_NV = F.linear(x_ND, weight_VD).float()
    nll_N = F.cross_entropy(logits_NV, target_N, reduction="none")
    return (token_weight_N * (nll_N + z_loss * logits_NV.logsumexp(dim=1).square())).sum(), nll_N


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [1, 7, 2**21])
def test_value_and_gradients_equal_the_materialized_loss(
    linear_cross_entropy: Backend, chunk: int, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CPU_LOGITS", 1)
    monkeypatch.setattr(losses, "TARGETS", chunk)
    monkeypatch.setattr(losses, "ROWS", 64)
    x_ND, weight_VD, target_N, token_weight_N = inputs()
    expected, expected_nll_N = materialized(x_ND, weight_VD, target_N, token_weight_N, z_loss)
    expected_grads = torch.autograd.grad(expected * 3, (x_ND, weight_VD))
    loss = linear_cross_entropy(x_ND, weight_VD, target_N, token_weight_N, z_loss)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(loss.nll_N, expected_nll_N, rtol=1e-6, atol=1e-6)
    assert torch.allclose(loss.lse_N, F.linear(x_ND, weight_VD).logsumexp(dim=1), rtol=1e-6)
    assert not loss.nll_N.requires_grad
    for ours, theirs in zip(torch.autograd.grad(loss.total * 3, (x_ND, weight_VD)), expected_grads, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("weighted", [False, True])
def test_in_bfloat16_the_error_is_that_of_materialized_logits(
    linear_cross_entropy: Backend, weighted: bool, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CPU_LOGITS", 1)
    monkeypatch.setattr(losses, "TARGETS", 200)  # per chunk, the last one shorter
    x_ND, weight_VD, target_N, token_weight_N = inputs(512, 64, 2000)
    given = x_ND, weight_VD, target_N, token_weight_N if weighted else torch.ones_like(token_weight_N), z_loss
    exact = torch.autograd.grad(materialized(*given)[0], (x_ND, weight_VD))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = torch.autograd.grad(materialized(*given)[0], (x_ND, weight_VD))
        ours = torch.autograd.grad(linear_cross_entropy(*given).total, (x_ND, weight_VD))
    for reference, fused, true in zip(theirs, ours, exact, strict=True):
        assert (fused - true).norm() <= 1.25 * (reference - true).norm()


def test_in_bfloat16_the_z_loss_still_shrinks_the_logits(linear_cross_entropy: Backend) -> None:
    x_ND, weight_VD, target_N, _ = inputs(512, 64, 2000)
    weight_VD = (weight_VD / 8).detach().requires_grad_()  # logits of size 1

    def summed_gradient(z_loss: float) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(x_ND, weight_VD, target_N, None, z_loss)
        return torch.autograd.grad(loss.total, weight_VD)[0].sum(0)

    # Summed over rows, the nll's gradient by the logits is zero and the z-loss's is 2 z lse.
    lse_N = F.linear(x_ND, weight_VD).logsumexp(dim=1).detach()
    expected_D = (2e-4 * lse_N[:, None] * x_ND).sum(0)
    assert (summed_gradient(1e-4) - summed_gradient(0.0) - expected_D).norm() <= 0.5 * expected_D.norm()


def test_without_targets_the_loss_is_zero(linear_cross_entropy: Backend) -> None:
    x_ND, weight_VD, target_N, _ = inputs(targets=0)
    loss = linear_cross_entropy(x_ND, weight_VD, target_N)
    assert loss.total.item() == 0
    assert loss.nll_N.shape == (0,)


def test_frozen_rows_need_no_gradient(linear_cross_entropy: Backend) -> None:
    x_ND, weight_VD, target_N, _ = inputs()
    loss = linear_cross_entropy(x_ND, weight_VD.detach(), target_N)
    torch.autograd.backward(loss.total)
    assert x_ND.grad is not None
    assert weight_VD.grad is None
    with torch.no_grad():
        assert linear_cross_entropy(x_ND, weight_VD, target_N).total.item() == pytest.approx(loss.total.item())


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_blocks_are_one_matrix_and_only_those_that_train_have_a_gradient(
    linear_cross_entropy: Backend, precision: torch.dtype
) -> None:
    x_ND, weight_VD, target_N, token_weight_N = inputs(vocabulary=91)
    target_N[0] = 90  # the last row, beside the pads

    def grads(rows: Tensor | list[Tensor], by: list[Tensor]) -> tuple[TokenLoss, tuple[Tensor | None, ...]]:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = linear_cross_entropy(x_ND, rows, target_N, token_weight_N, 1e-2)
        return loss, torch.autograd.grad(loss.total, by, allow_unused=True)

    expected, (x_grad, weight_grad) = grads(weight_VD, [x_ND, weight_VD])
    assert x_grad is not None
    assert weight_grad is not None
    blocks = [block.detach().requires_grad_() for block in weight_VD.split([50, 7, 34])]
    loss, (own_x, *own) = grads(blocks, [x_ND, *blocks])
    assert own_x is not None
    assert torch.equal(loss.nll_N, expected.nll_N)
    assert torch.equal(own_x, x_grad)
    assert torch.equal(torch.cat([grad for grad in own if grad is not None]), weight_grad)
    blocks[0].requires_grad_(False)
    *_, last = grads(blocks, [x_ND, *blocks[1:]])[1]
    assert last is not None
    assert torch.equal(last, weight_grad[57:])


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("rows", [1, 63, 64, 91, 1541])
def test_pads_change_no_value(rows: int, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, weight_VD, target_N, token_weight_N = inputs(vocabulary=rows)
    weight_VD = (4 * weight_VD - 3).detach().requires_grad_()  # logits far below 0, that of a row of zeros

    def values() -> tuple[Tensor, ...]:
        loss = losses.linear_cross_entropy(x_ND, weight_VD, target_N, token_weight_N, z_loss)
        return (*loss, *torch.autograd.grad(loss.total, (x_ND, weight_VD)))

    expected = values()
    monkeypatch.setattr(padded_rows, "DEVICES", {"cpu"})
    assert padded_rows.padded_count(rows, torch.device("cpu")) % 64 == 0
    for own, other in zip(values(), expected, strict=True):
        assert own.shape == other.shape
        assert (own - other).norm() <= 1e-6 * other.norm()


def test_rows_are_padded_on_cuda_alone() -> None:
    assert padded_rows.padded_count(66_823, torch.device("cuda")) == 66_880
    assert padded_rows.padded_count(16_384, torch.device("cuda")) == 16_384
    assert padded_rows.padded_count(66_823, torch.device("cpu")) == 66_823


def test_a_single_aligned_matrix_is_not_copied() -> None:
    weight_VD = torch.ones(64, 3)
    assert padded_rows.join_rows([weight_VD], 64).data_ptr() == weight_VD.data_ptr()
    joined_PD = padded_rows.join_rows([weight_VD, weight_VD.bfloat16()], 192)
    assert joined_PD.dtype == torch.float32
    assert joined_PD.sum(1).tolist() == [3.0] * 128 + [0.0] * 64


@pytest.mark.parametrize(
    ("targets", "rows", "expected"),
    [(16_128, 66_880, 2048), (2049, 66_880, 1152), (100, 66_880, 100), (9000, 2**40, 256), (0, 66_880, 1)],
)
def test_chunks_on_a_gpu_are_of_equal_size_and_whole_tiles(targets: int, rows: int, expected: int) -> None:
    assert chunk_size(targets, rows, torch.device("cuda")) == expected


def test_every_backend_of_the_config_is_implemented() -> None:
    assert set(LOSS_BACKENDS) == set(BACKENDS)


def test_a_torch_without_a_chunked_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(ValueError, match=r"loss\.backend=torch: torch .* has no chunked loss; use loss\.backend=fused"):
        loss_backend("torch")

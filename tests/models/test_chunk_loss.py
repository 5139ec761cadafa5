"""The loss's Triton kernel: values by Triton's interpreter, compilation for a GPU, and what replaces it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import t2i_lm.models.chunk_loss as chunks
from t2i_lm.models.chunk_loss import chunk_loss, single_pass
from t2i_lm.models.cross_entropy import linear_cross_entropy
from tests.marks import needs_gpu

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")


@pytest.mark.slow
def test_the_kernel_computes_what_torchs_operations_do() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.models.interpreted_kernel"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    worst = json.loads(done.stdout)
    assert worst["float32"] <= 1e-6
    assert worst["whole"] <= 1e-6
    assert worst["bfloat16"] <= 2**-7  # of 8 bits


@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu_and_reads_16_bytes_at_a_time() -> None:
    """Without a GPU, up to the machine code for an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    from t2i_lm.models import chunk_loss_kernel as kernel

    pointers = {"logits": "*bf16", "target_of": "*i64", "nll_of": "*fp32", "lse_of": "*fp32"}
    numbers = {"stride": "i64", "classes": "i32", "columns": "i32", "z_loss": "fp32"}
    constants = {"DIFFERENTIATE": True, "BLOCK": kernel.BLOCK}
    names = [*pointers, *numbers]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("logits", "stride", "columns")}
    signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel._row, signature=signature, constexprs=constants, attrs=aligned)
    how = {"num_warps": kernel.WARPS, "enable_fp_fusion": True}
    code = compile_source(source, target=GPUTarget("cuda", 90, 32), options=how).asm["ptx"]
    assert "ld.global.v4.b32" in code
    assert "st.global.v4.b32" in code


def refused(monkeypatch: pytest.MonkeyPatch, one_pass: Any) -> Any:
    """`single_pass` on a machine with a GPU that is none."""
    monkeypatch.setitem(sys.modules, "t2i_lm.models.chunk_loss_kernel", SimpleNamespace(one_pass=one_pass))
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **how: torch.ones(size, **how))
    return single_pass.__wrapped__(torch.device("cuda"))


def test_a_kernel_that_fails_or_is_wrong_is_replaced_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    assert refused(monkeypatch, fails) is None
    assert capsys.readouterr().err == (
        "loss: no Triton kernel (RuntimeError: Failed to find C compiler.); several passes over the logits instead "
        "(slower)\n"
    )
    assert refused(monkeypatch, lambda *_: (torch.ones(2), None)) is None
    assert "(wrong values)" in capsys.readouterr().err
    works = lambda *_: (torch.full((2,), 50.0).log(), None)  # noqa: E731
    assert refused(monkeypatch, works) is works
    assert not capsys.readouterr().err


def test_a_cpu_uses_torchs_operations(capsys: pytest.CaptureFixture[str]) -> None:
    assert single_pass(torch.device("cpu")) is None
    assert not capsys.readouterr().err


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_on_a_gpu_the_kernel_equals_torchs_operations(
    z_loss: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    logits_CP = (8 * torch.randn(300, 66_880, generator=generator, device=device)).to(dtype)
    logits_CP[:, 66_823:] = 0
    target_C = torch.randint(66_823, (300,), generator=generator, device=device)
    target_C[0] = 66_822
    theirs_CP = logits_CP.clone()
    assert single_pass(device) is not None
    found = chunk_loss(device, logits_CP, 66_823, z_loss)(logits_CP, target_C, True)
    monkeypatch.setattr(chunks, "single_pass", lambda _: None)
    expected = chunk_loss(device, theirs_CP, 66_823, z_loss)(theirs_CP, target_C, True)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)
    assert (logits_CP - theirs_CP).float().norm() <= (
        1e-6 if dtype == torch.float32 else 2e-3
    ) * theirs_CP.float().norm()


@needs_gpu
def test_on_a_gpu_odd_rows_have_the_losses_and_gradients_of_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(700, 64, generator=generator).requires_grad_()
    blocks = [torch.randn(rows, 64, generator=generator).requires_grad_() for rows in (1201, 7, 333)]
    target_N = torch.randint(1541, (700,), generator=generator)
    expected = linear_cross_entropy(x_ND, blocks, target_N, None, 1e-2)
    grads = torch.autograd.grad(expected.total, (x_ND, *blocks))
    x_ND, *blocks = (tensor.detach().cuda().requires_grad_() for tensor in (x_ND, *blocks))
    found = linear_cross_entropy(x_ND, blocks, target_N.cuda(), None, 1e-2)
    torch.testing.assert_close(found.nll_N.cpu(), expected.nll_N, rtol=1e-5, atol=1e-5)
    for own, other in zip(torch.autograd.grad(found.total, (x_ND, *blocks)), grads, strict=True):
        assert (own.cpu() - other).norm() <= 1e-5 * other.norm()

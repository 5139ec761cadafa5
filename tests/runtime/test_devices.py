"""Unsupported devices and precisions are refused by name, and out-of-memory errors name the keys that help."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.config.sections import DataConfig, TrainerConfig
from t2i_lm.experiment.dry_run import plan
from t2i_lm.experiment.restore import load_trained
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.flops import PEAKS, flop_per_token, formula, peak_flops, product_parameters
from t2i_lm.runtime import devices
from t2i_lm.runtime.devices import (
    can_compile,
    is_out_of_memory,
    memory_advice,
    multiplies_bfloat16,
    require_device,
)
from t2i_lm.train import main
from t2i_lm.training import run as session
from tests.marks import needs_gpu, needs_torchs
from tests.runs import EXPERIMENTS, PRETRAINED, train


def processor_seconds(dtype: torch.dtype) -> float:
    """Processor time of one matmul of 512 x 512 matrices, all threads together."""
    matrix_DD = torch.ones(512, 512, dtype=dtype)
    before = time.process_time()
    torch.mm(matrix_DD, matrix_DD)
    return time.process_time() - before


def test_bfloat16_is_chosen_where_the_processor_multiplies_it_faster_than_float32() -> None:
    rounds = [(processor_seconds(torch.bfloat16), processor_seconds(torch.float32)) for _ in range(20)]
    bfloat16, float32 = (min(column) for column in zip(*rounds, strict=True))
    assert multiplies_bfloat16("cpu") == (bfloat16 < float32), (bfloat16, float32)
    assert not multiplies_bfloat16("meta")


@pytest.mark.parametrize("accelerator", ["tpu", "gpu", "cuda"])
def test_a_missing_accelerator_is_refused_with_the_available_ones(accelerator: str) -> None:
    if accelerator != "tpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=rf"trainer\.accelerator='{accelerator}': expected one of auto, cpu"):
        require_device(TrainerConfig(accelerator=accelerator))
    require_device(TrainerConfig(accelerator="cpu", devices=2, precision="bf16-mixed"))


def test_a_gpu_older_than_torchs_kernels_is_refused_before_anything_is_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_name", "Tesla V100-SXM2-16GB")):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_120"])
    with pytest.raises(ValueError, match=r"built for sm_75, .* not for this machine's Tesla V100-SXM2-16GB \(sm_70\)"):
        require_device(TrainerConfig())
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_60", "sm_90a"])
    require_device(TrainerConfig())


def test_compilation_needs_a_compiler_and_pythons_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    monkeypatch.setattr(devices, "get_path", lambda _: str(tmp_path))
    assert not can_compile("--compile")
    message = f"--compile: no compiler ({tmp_path}/g++; CXX names another one), no Python.h (on Debian: apt install "
    assert message in capsys.readouterr().err
    (tmp_path / "g++").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    assert can_compile("--compile")
    assert capsys.readouterr().err == ""


def test_float8_is_refused_on_a_processor_without_it() -> None:
    with pytest.raises(ValueError, match=r"trainer\.fp8=True: expected false: this processor has no float8 matmuls"):
        require_device(TrainerConfig(accelerator="cpu", fp8=True))


def test_autotuning_is_refused_on_a_processor() -> None:
    with pytest.raises(ValueError, match=r"trainer\.autotune=True: expected false: this run uses no GPU"):
        require_device(TrainerConfig(accelerator="cpu", compile=True, autotune=True))


@needs_gpu
def test_more_gpus_than_present_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.devices=99"):
        require_device(TrainerConfig(devices=99))


def test_out_of_memory_is_distinguished_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**57)
    assert is_out_of_memory(raised.value)
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(raised.value)
    for message in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"):
        assert is_out_of_memory(RuntimeError(message))


@pytest.mark.slow
def test_running_out_of_memory_in_the_report_names_the_keys(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(session, "write_report", fail)
    assert main([PRETRAINED, *tiny, f"run.dir={tmp_path}", "trainer.max_steps=4"]) == 2
    assert "out of memory with a micro-batch of" in capsys.readouterr().err


def test_a_loss_that_torch_lacks_is_refused_before_the_data_preparation(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    monkeypatch.setattr(session, "build", None)
    assert main([PRETRAINED, *tiny, f"run.dir={tmp_path}", "loss.backend=torch"]) == 2
    assert "use loss.backend=fused" in capsys.readouterr().err


@pytest.mark.slow
@needs_torchs
def test_a_model_trained_with_torchs_loss_loads_without_it(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(PRETRAINED, tmp_path, *tiny, "trainer.max_steps=4", "loss.backend=torch")
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions")
    assert load_trained(run.folder).config.loss.backend == "torch"


def test_the_advice_names_the_micro_batch_and_the_keys_that_reduce_it() -> None:
    trainer = TrainerConfig(devices=2, accumulate_grad_batches=2, max_steps=3000)
    config = ExperimentConfig(trainer=trainer, data=DataConfig(batch_size=64))
    advice = memory_advice(config)
    assert "micro-batch of 16 sequences" in advice
    for key in ("accumulate_grad_batches=4", "activation_checkpointing=true", "strategy=fsdp2"):
        assert f"trainer.{key}" in advice
    sharded = replace(trainer, accumulate_grad_batches=1, strategy="fsdp2")
    assert "micro-batches, between which whole gradients are held)" in memory_advice(replace(config, trainer=sharded))
    odd = ExperimentConfig(trainer=TrainerConfig(activation_checkpointing=True), data=DataConfig(batch_size=3))
    assert "reduce it: a smaller data.batch_size. " in memory_advice(odd)


def test_the_papers_flop_per_token_follow_from_its_sizes() -> None:
    """6 N + 12 L D T by hand: N = 24 (4 D^2 + 3 D F) + V D with D 2048, F 5632, V 66,823; T 1152."""
    decoder = plan(load_experiment(EXPERIMENTS / "t2i_scratch.yaml", "paper")).model
    assert isinstance(decoder, Backbone)
    products = 24 * (4 * 2048**2 + 3 * 2048 * 5632) + 66_823 * 2048
    assert product_parameters(decoder) == pytest.approx(products, rel=2e-4)  # norms are counted, too
    assert flop_per_token(decoder, 1152) == pytest.approx(8.899e9, rel=1e-3)
    assert "989 TFLOP/s" in formula(decoder, 1152, "NVIDIA H100 80GB HBM3")
    assert "T=1152" in formula(decoder, 1152, None)


def test_peaks_distinguish_variants_of_a_device() -> None:
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == PEAKS["H100"] == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    for name in ("some card", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "GRID A100-10C"):
        assert peak_flops(name) is None, name

"""Capabilities of the local devices, and memory errors."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from sysconfig import get_path
from typing import Any

import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import SHARDED, TrainerConfig, require

ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
FLOAT8_CAPABILITY = (8, 9)
# AMD architectures with bfloat16 matmuls: MI100 and later, RDNA 3 and later.
BFLOAT16_AMD = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
COMPILER = "clang++" if sys.platform == "darwin" else "g++"  # that torch.compile calls, unless CXX names another one
# In the RuntimeErrors of CUDA and its libraries, whose memory is not torch's allocator's.
GPU_FULL = ("CUDA error: out of memory", "HIP error: out of memory", "_STATUS_ALLOC_FAILED")


def require_device(trainer: TrainerConfig) -> None:
    """Checks that this machine has the devices of a run, and that they support its precision.

    Raises:
        ValueError: naming the key and the values possible here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    possible = [name for name in ACCELERATORS if name not in ("gpu", "cuda") or gpus]
    here = f"one of {', '.join(possible)} on this machine"
    require(trainer.accelerator in possible, "trainer.accelerator", trainer.accelerator, here)
    if uses_gpu(trainer.accelerator):
        here = f"at most {gpus}, the GPUs of this machine (trainer.num_nodes counts machines)"
        require(trainer.devices <= gpus, "trainer.devices", trainer.devices, here)
        _require_kernels()
        slow = trainer.precision == "bf16-mixed" and not multiplies_bfloat16("cuda")
        name = torch.cuda.get_device_name()
        require(not slow, "trainer.precision", trainer.precision, f"32-true: {name} has no bfloat16 matmuls")
    if trainer.fp8:
        _require_float8(trainer)
    tunes = uses_gpu(trainer.accelerator)
    require(tunes or not trainer.autotune, "trainer.autotune", trainer.autotune, "false: this run uses no GPU")


def _require_kernels() -> None:
    """Checks that torch is built for the GPU: else the first kernel fails, after the data is prepared."""
    capability, built = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    numbers = [int(digits) for name in built if (digits := re.sub(r"\D", "", name.partition("_")[2]))]
    if torch.version.hip is None and numbers and capability[0] * 10 + capability[1] < min(numbers):
        raise ValueError(
            f"trainer.accelerator: torch {torch.__version__} is built for {', '.join(built)}, not for this machine's "
            f"{torch.cuda.get_device_name()} (sm_{capability[0]}{capability[1]}): install torch for an older CUDA "
            "(https://download.pytorch.org/whl/cu126), or use trainer.accelerator=cpu"
        )


def _require_float8(trainer: TrainerConfig) -> None:
    gpu = uses_gpu(trainer.accelerator)
    name = torch.cuda.get_device_name() if gpu else "this processor"
    # On ROCm the capability is the number of AMD's architecture.
    capable = gpu and torch.version.hip is None and torch.cuda.get_device_capability() >= FLOAT8_CAPABILITY
    here = f"false: {name} has no float8 matmuls (NVIDIA GPUs since Ada and Hopper do)"
    require(capable, "trainer.fp8", trainer.fp8, here)
    if find_spec("torchao") is None:
        raise ValueError("trainer.fp8=True: requires torchao, which is not installed: pip install 't2i_lm[fp8]'")


def is_gpu_full(error: BaseException) -> bool:
    """Whether an error means that a GPU is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in GPU_FULL)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a GPU or the machine is out of memory."""
    return is_gpu_full(error) or "DefaultCPUAllocator" in str(error)


def memory_advice(config: ExperimentConfig) -> str:
    """A message naming the settings that ran out of memory, and the keys that reduce it."""
    trainer, data = config.trainer, config.data
    accumulate = 2 * trainer.accumulate_grad_batches
    advice = [f"trainer.accumulate_grad_batches={accumulate} (the same steps in smaller micro-batches)"]
    if config.micro_batch % 2 or config.task == "align":
        advice = ["a smaller data.batch_size"]
    elif trainer.strategy in SHARDED and trainer.accumulate_grad_batches == 1:
        advice = [f"{advice[0][:-1]}, between which whole gradients are held)"]
    if not trainer.activation_checkpointing and config.task not in ("align", "image_tokenizer"):
        advice.append("trainer.activation_checkpointing=true (slower by a third)")
    if trainer.processes > 1 and trainer.strategy != "fsdp2":
        advice.append("trainer.strategy=fsdp2 (each process holds a part of the model)")
    return (
        f"out of memory with a micro-batch of {config.micro_batch} sequences of up to {data.length} positions "
        f"(data.batch_size={data.batch_size} on {trainer.processes} processes, "
        f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}). To reduce it: {'; '.join(advice)}. "
        "--dry-run estimates it"
    )


def uses_gpu(accelerator: str) -> bool:
    """Whether `trainer.accelerator` means a CUDA device here."""
    return torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")


def precision(config: ExperimentConfig) -> str:
    """`auto` is bf16-mixed if the device has fast bfloat16 matmuls, else float32; master weights are float32."""
    if config.trainer.precision != "auto":
        return config.trainer.precision
    device = "cuda" if uses_gpu(config.trainer.accelerator) else "cpu"
    return "bf16-mixed" if multiplies_bfloat16(device) else "32-true"


def device_name(config: ExperimentConfig) -> str | None:
    """The driver's name of the GPU that a run would use; None on a CPU."""
    return torch.cuda.get_device_name() if uses_gpu(config.trainer.accelerator) else None


def multiplies_bfloat16(device: str) -> bool:
    """Whether bfloat16 matmuls are faster than float32 on a device type (`cuda`, `cpu`)."""
    if device == "cuda" and torch.version.hip is not None:  # where torch calls every GPU capable
        return torch.cuda.get_device_properties().gcnArchName.startswith(BFLOAT16_AMD)
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # The operator is absent where torch is built without oneDNN, as on Apple silicon.
    onednn: Any = torch.backends.mkldnn
    if device != "cpu" or not (onednn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    # oneDNN also supports AVX-512 processors without instructions for bfloat16, several times slower than float32.
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.12
        return bool(torch.cpu._is_avx512_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions of float32 in float32: cuDNN's default, TF32 with 10 bits, gives other image ids than a CPU."""
    cudnn: Any = torch.backends.cudnn
    tf32 = cudnn.conv.fp32_precision == "tf32"
    if tf32:
        cudnn.allow_tf32 = False
    try:
        yield
    finally:
        if tf32:
            cudnn.allow_tf32 = True


def can_compile(key: str) -> bool:
    """Whether torch.compile finds a C++ compiler and Python's headers; if not, prints that `key` has no effect."""
    if missing := missing_to_compile():
        print(f"{key}: {', '.join(missing)}, nothing is compiled", file=sys.stderr)
    return not missing


def missing_to_compile() -> list[str]:
    """What torch.compile requires on a CPU and does not find."""
    compiler = os.environ.get("CXX") or COMPILER
    missing = [] if which(compiler) else [f"no compiler ({compiler}; CXX names another one)"]
    if not Path(get_path("include"), "Python.h").is_file():
        missing.append("no Python.h (on Debian: apt install python3-dev)")
    return missing

"""What the processor at hand can do."""

import os
import sys
from importlib.util import find_spec
from shutil import which

import torch

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import SHARDED, TrainerConfig, require

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
FLOAT8_CAPABILITY = (8, 9)
# torch.compile needs one of these.
COMPILERS = ("c++", "g++", "clang++")
# In messages of plain RuntimeErrors: of CUDA and its libraries, which do not ask torch's allocator.
GPU_FULL = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def require_device(trainer: TrainerConfig) -> None:
    """Checks that a run's processors are here and can compute as it asks.

    Raises:
        ValueError: naming the key and what is possible here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    possible = [name for name in ACCELERATORS if name not in ("gpu", "cuda") or gpus]
    if not torch.backends.mps.is_available():
        possible.remove("mps")
    require(trainer.accelerator in possible, "trainer.accelerator", trainer.accelerator, f"here {', '.join(possible)}")
    if uses_gpu(trainer.accelerator):
        here = f"at most {gpus}, the GPUs of this machine (trainer.num_nodes counts machines)"
        require(trainer.devices <= gpus, "trainer.devices", trainer.devices, here)
        slow = trainer.precision == "bf16-mixed" and not multiplies_bfloat16("cuda")
        name = torch.cuda.get_device_name()
        require(not slow, "trainer.precision", trainer.precision, f"32-true: {name} does not multiply in bfloat16")
    if trainer.fp8:
        _require_float8(trainer)


def _require_float8(trainer: TrainerConfig) -> None:
    gpu = uses_gpu(trainer.accelerator)
    name = torch.cuda.get_device_name() if gpu else "this processor"
    capable = gpu and torch.cuda.get_device_capability() >= FLOAT8_CAPABILITY
    here = f"false: {name} does not multiply in float8 (GPUs of NVIDIA from Ada and Hopper on do)"
    require(capable, "trainer.fp8", trainer.fp8, here)
    if find_spec("torchao") is None:
        raise ValueError("trainer.fp8=True: it needs torchao, which is not installed: pip install 't2i_lm[fp8]'")


def is_gpu_full(error: BaseException) -> bool:
    """Whether an error says that a GPU's memory is used up."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in GPU_FULL)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's or the machine's memory is used up."""
    return is_gpu_full(error) or "DefaultCPUAllocator" in str(error)


def memory_advice(config: ExperimentConfig) -> str:
    """What ran out of memory, and which keys lower what it takes."""
    trainer, data = config.trainer, config.data
    accumulate = 2 * trainer.accumulate_grad_batches
    ways = [f"trainer.accumulate_grad_batches={accumulate} (the same steps in smaller parts)"]
    if config.micro_batch % 2 or config.task == "align":
        ways = ["a smaller data.batch_size"]
    elif trainer.strategy in SHARDED and trainer.accumulate_grad_batches == 1:
        ways = [f"{ways[0][:-1]}, between which whole gradients are held)"]
    if not trainer.activation_checkpointing:
        ways.append("trainer.activation_checkpointing=true (slower by a third)")
    if trainer.devices * trainer.num_nodes > 1 and trainer.strategy != "fsdp2":
        ways.append("trainer.strategy=fsdp2 (each process holds a part of the model)")
    return (
        f"out of memory with a micro-batch of {config.micro_batch} sequences of up to {data.length} positions "
        f"(data.batch_size={data.batch_size} on {trainer.devices * trainer.num_nodes} processes, "
        f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}). Less is used with: {'; '.join(ways)}. "
        "--dry-run estimates it"
    )


def uses_gpu(accelerator: str) -> bool:
    """Whether `trainer.accelerator` means a CUDA device here."""
    return torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")


def precision(config: ExperimentConfig) -> str:
    """bf16-mixed where the device multiplies in bfloat16, else float32; float32 master weights either way."""
    if config.trainer.precision != "auto":
        return config.trainer.precision
    device = "cuda" if uses_gpu(config.trainer.accelerator) else "cpu"
    return "bf16-mixed" if multiplies_bfloat16(device) else "32-true"


def device_name(config: ExperimentConfig) -> str | None:
    """The GPU that a run would use, as its driver calls it."""
    return torch.cuda.get_device_name() if uses_gpu(config.trainer.accelerator) else None


def local_rank() -> int:
    """The number of this process on its machine; that of its GPU, too."""
    return _number("LOCAL_RANK", "SLURM_LOCALID", 0)


def global_rank() -> int:
    """The number of this process among all."""
    return _number("RANK", "SLURM_PROCID", 0)


def world_size() -> int:
    """How many processes there are."""
    return _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)


def _number(torchrun: str, srun: str, alone: int) -> int:
    """What the launcher says: torchrun or Lightning, or else Slurm's `srun` of several tasks."""
    under_srun = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return int(os.environ.get(torchrun, os.environ[srun] if under_srun else alone))


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device type (`cuda`, `cpu`) multiplies matrices in bfloat16 faster than in float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def can_compile(key: str) -> bool:
    """Whether there is a C++ compiler; says where there is none, naming what asked for it."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    found = any(map(which, wanted))
    if not found:
        print(f"{key}: none of {', '.join(wanted)} found, so nothing is compiled", file=sys.stderr)
    return found

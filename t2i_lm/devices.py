"""What the processor at hand can do."""

import torch


def uses_gpu(accelerator: str) -> bool:
    """Whether `trainer.accelerator` means a CUDA device here."""
    return torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device type (`cuda`, `cpu`) multiplies matrices in bfloat16 faster than in float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

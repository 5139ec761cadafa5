"""What the processor at hand can do."""

import torch


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device type (`cuda`, `cpu`) multiplies matrices in bfloat16 faster than in float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

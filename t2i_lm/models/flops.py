"""Floating-point operations per token of training, and peak rates of GPUs, for model FLOPs utilization (MFU).

By the convention of PaLM and nanoGPT: 6 N + 12 L D T operations per token, with N the parameters of matrix products
(output rows included, embedding excluded), L layers, D width, T positions. Recomputed blocks are not counted, and
frozen parts count as trained, so that arms and settings compare. Of routed experts, those count that a token uses, and
of modality experts one.
"""

import re

from t2i_lm.models.backbone import Backbone
from t2i_lm.models.experts import expert_weights
from t2i_lm.models.modality_experts import idle_parameters

# Dense bfloat16 operations per second, by words in the driver's name of the device; the first match counts.
PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "L40S": 362e12,
}


def product_parameters(decoder: Backbone) -> int:
    """N: all parameters except an untied embedding and the experts that a token does not use."""
    total = sum(parameter.numel() for parameter in decoder.parameters()) - idle_parameters(decoder)
    total -= sum(weights.inactive for weights in expert_weights(decoder))
    return total if decoder.config.weight_tying else total - decoder.tok_embeddings.matrix().numel()


def flop_per_token(decoder: Backbone, length: int) -> float:
    """Operations per position of a forward and backward pass over `length` positions."""
    shape = decoder.config
    return 6.0 * product_parameters(decoder) + 12.0 * shape.n_layers * shape.hidden_dim * length


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 operations per second of a device; None if unknown, as of a part of one (MIG, virtual GPUs)."""
    words = re.split(r"[\s-]+", device_name)
    if {"MIG", "GRID"} & {*words}:
        return None
    return next((peak for name, peak in PEAKS.items() if {*name.split()} <= {*words}), None)


def formula(decoder: Backbone, length: int, device_name: str | None) -> str:
    """The terms of `mfu`, in one line."""
    shape, per_token = decoder.config, flop_per_token(decoder, length)
    peak = None if device_name is None else peak_flops(device_name)
    share = "" if peak is None else f"; MFU: of {peak / 1e12:.0f} TFLOP/s ({device_name}, dense bfloat16)"
    return (
        f"compute: {per_token:.4g} FLOP/token = 6 N + 12 L D T with N={product_parameters(decoder):,} "
        f"L={shape.n_layers} D={shape.hidden_dim} T={length}{_experts(decoder)}{share}"
    )


def _experts(decoder: Backbone) -> str:
    """How the experts of a mixture were counted."""
    if idle_parameters(decoder):
        return " (N counts one of two modality experts)"
    weights = expert_weights(decoder)
    if not weights:
        return ""
    counts = {(len(one.parameter), one.per_token) for one in weights}
    terms = [
        f"all {experts} experts, since their number per token is unknown"
        if used is None
        else f"{used} of {experts} experts"
        for experts, used in sorted(counts, key=str)
    ]
    return f" (N counts {', '.join(terms)})"

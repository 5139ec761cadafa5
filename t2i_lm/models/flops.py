"""Floating-point operations of training, and what accelerators do at most: what MFU is a share of.

The convention is that of PaLM and nanoGPT: 6 N + 12 L D T operations a token, N the parameters of matrix products
(the output rows among them, the embedding not), L layers, D width, T positions; recomputed blocks are not counted
and frozen parts are counted as if trained, so that arms and settings compare.
"""

from t2i_lm.models.backbone import Backbone

# Dense bfloat16 operations a second, by a part of the device's name as its driver gives it; the first match counts.
PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
}


def product_parameters(decoder: Backbone) -> int:
    """N: all parameters but an embedding of its own."""
    every = sum(parameter.numel() for parameter in decoder.parameters())
    return every if decoder.config.weight_tying else every - decoder.tok_embeddings.matrix().numel()


def flop_per_token(decoder: Backbone, length: int) -> float:
    """Operations of forward and backward for each of `length` positions."""
    shape = decoder.config
    return 6.0 * product_parameters(decoder) + 12.0 * shape.n_layers * shape.hidden_dim * length


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 operations a second of a device; None where this is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def formula(decoder: Backbone, length: int, device_name: str | None) -> str:
    """How `mfu` comes about, in one line."""
    shape, per_token = decoder.config, flop_per_token(decoder, length)
    peak = None if device_name is None else peak_flops(device_name)
    share = "" if peak is None else f"; MFU: of {peak / 1e12:.0f} TFLOP/s ({device_name}, dense bfloat16)"
    return (
        f"compute: {per_token:.4g} FLOP/token = 6 N + 12 L D T with N={product_parameters(decoder):,} "
        f"L={shape.n_layers} D={shape.hidden_dim} T={length}{share}"
    )

"""Architectures by name, in the keys of open_lm's model JSON."""

from typing import Any

_NEOX = {"vocab_size": 50432, "seq_len": 2048}
# Width, layers and heads of open_lm's own model files at commit 9bb92ef, without open_lm_87m, whose width of 488 is no
# multiple of its 12 heads.
_SIZES = {
    "open_lm_11m": (96, 12, 12),
    "open_lm_11m_v2": (96, 8, 4),
    "open_lm_25m": (192, 12, 12),
    "open_lm_41m": (288, 12, 12),
    "open_lm_79m_v2": (512, 8, 4),
    "open_lm_154m_v2": (576, 24, 8),
    "open_lm_160m": (768, 12, 12),
    "open_lm_410m": (1024, 24, 16),
    "open_lm_411m_v2": (1024, 24, 8),
    "open_lm_830m": (1536, 24, 16),
    "open_lm_1b": (2048, 24, 16),
    "open_lm_3b": (2560, 32, 32),
    "open_lm_7b": (4096, 32, 32),
}


def _preset(size: tuple[int, int, int], positional: str, **more: Any) -> dict[str, Any]:
    names = ("hidden_dim", "n_layers", "n_heads")
    return _NEOX | dict(zip(names, size, strict=True)) | {"positional_embedding_type": positional} | more


# Omitted keys have the defaults of upstream's command line: rotary positions, LayerNorm with bias, no qk-norm.
# The released 1B model is `open_lm_1b_old`, whose head_rotary positions amount to none.
PRESETS: dict[str, dict[str, Any]] = {
    "demo_7m": _preset((256, 6, 4), "rotary", vocab_size=4096, seq_len=512),
    **{name: _preset(size, "rotary") for name, size in _SIZES.items()},
    "open_lm_1b_old": _preset(_SIZES["open_lm_1b"], "head_rotary"),
}

"""Conversion of SBER-MoVQGAN checkpoints (ai-forever/MoVQGAN) to diffusers.

Widths, depth, attention and codebook size are inferred from the tensor shapes.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# (first level's width, residual blocks per level) of the published models, all of levels 1-2-2-4 with 16,384 codes.
SIZES = {(128, 2): "67M", (128, 4): "102M", (256, 2): "270M"}
LEVELS, CODES = (1, 2, 2, 4), 16_384
AVERAGES = ("model_ema.", "ema_")
# Prefixes of tensors in a training checkpoint outside the autoencoder.
SKIPPED = ("loss.", *AVERAGES)
OTHERS = "other VQ models are read by a plug-in (docs/plugins.md)"

_ENCODER_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_DECODER_ATTENTION = _ENCODER_ATTENTION | {"norm": "spatial_norm"}
_MID = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}


def require_movqgan(state: Mapping[str, Tensor]) -> None:
    """Checks that a state dict has the encoder and the decoder of a MoVQGAN.

    Raises:
        ValueError: if it is another VQ model's.
    """
    if not any(key.startswith("encoder.down.") for key in state):
        raise ValueError(f"it has no tensors encoder.down.*; {OTHERS}")
    if not any(key.startswith("decoder.") and ".conv_y." in key for key in state):
        raise ValueError(f"its decoder is not normalized by the codes, as a VQGAN's of taming-transformers; {OTHERS}")


def diffusers_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of diffusers' `VQModel` for a MoVQGAN state dict.

    Raises:
        KeyError: naming the tensor that is missing in a file of another model.
    """
    levels = 1 + max(int(match[1]) for key in state if (match := re.match(r"encoder\.down\.(\d+)\.", key)))
    widths = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    blocks = sum(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", key) is not None for key in state)
    attends = [f"encoder.down.{level}.attn.0.q.weight" in state for level in range(levels)]
    codes, code_dim = state["quantize.embedding.weight"].shape
    return {
        "down_block_types": tuple("AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attends),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in reversed(attends)),
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "latent_channels": state["encoder.conv_out.weight"].shape[0],
        "num_vq_embeddings": codes,
        "vq_embed_dim": code_dim,
        "norm_type": "spatial",
    }


def size_name(config: Mapping[str, Any]) -> str:
    """`67M`, `102M` or `270M` for the published models, else a description of the shapes."""
    widths, blocks, codes = config["block_out_channels"], config["layers_per_block"], config["num_vq_embeddings"]
    published = tuple(width / widths[0] for width in widths) == LEVELS and codes == CODES
    name = SIZES.get((widths[0], blocks)) if published else None
    return name or f"{'-'.join(map(str, widths))} channels, {blocks} blocks per level, {codes:,} codes"


def to_diffusers(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The autoencoder's tensors in float32 under diffusers' names, attention's 1x1 convolutions as matrices."""
    renamed = {}
    for key, tensor in state.items():
        if not key.startswith(SKIPPED):
            name = diffusers_name(key, levels)
            is_projection = re.search(r"\.(to_q|to_k|to_v|to_out\.0)\.weight$", name) is not None
            renamed[name] = (tensor[:, :, 0, 0] if is_projection and tensor.ndim == 4 else tensor).float()
    return renamed


def diffusers_name(key: str, levels: int) -> str:
    """Diffusers' name of a MoVQGAN tensor; other names stay unchanged."""
    side = key.split(".", 1)[0]
    attention = _DECODER_ATTENTION if side == "decoder" else _ENCODER_ATTENTION

    def attend(match: re.Match[str]) -> str:
        return f"{match[1]}{attention[match[2]]}."

    key = re.sub(r"\.nin_shortcut\.", ".conv_shortcut.", key)
    key = re.sub(r"\.norm_out\.", ".conv_norm_out.", key)
    key = re.sub(r"\.mid\.(block_1|attn_1|block_2)\.", lambda match: f".mid_block.{_MID[match[1]]}.", key)
    key = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", key)
    key = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", key)
    key = re.sub(r"_blocks\.(\d+)\.block\.", r"_blocks.\1.resnets.", key)
    key = re.sub(r"_blocks\.(\d+)\.attn\.", r"_blocks.\1.attentions.", key)
    key = re.sub(r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv.", key)
    return re.sub(r"(\.attentions\.\d+\.)(norm|q|k|v|proj_out)\.", attend, key)

"""Pixels as models see them."""

import torch
from torch import Tensor


def to_unit(images_uint8_BCHW: Tensor) -> Tensor:
    """uint8 pixels -> [-1, 1]."""
    return images_uint8_BCHW.float() / 127.5 - 1


def to_uint8(pixels_BCHW: Tensor) -> Tensor:
    """[-1, 1] -> uint8 pixels, rounded and clamped."""
    return ((pixels_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

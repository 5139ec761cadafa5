"""open_lm's feed-forward layers, by its names for them.

Shapes: `B` batch, `T` tokens, `D` width, `F` feed-forward width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


def swiglu_width(dim: int) -> int:
    """8/3 of the model width, rounded up to a multiple of 256."""
    return 256 * ((int(8 * dim / 3) + 255) // 256)


class SwiGLU(nn.Module):
    """w3(silu(gate) * value) with gate and value from one projection `w12`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = swiglu_width(dim)
        self.w12 = nn.Linear(dim, 2 * width, bias=False)
        self.w3 = nn.Linear(width, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, value_BTF = self.w12(x_BTD).chunk(2, dim=-1)
        return self.w3(F.silu(gate_BTF) * value_BTF)  # type: ignore[no-any-return]

    def reset_parameters(self, depth: int, generator: Generator) -> None:
        """Truncated normals of std 1/sqrt(fan-in), the output projection scaled by depth (from 1)."""
        fan_in_normal_(self.w12.weight, generator)
        fan_in_normal_(self.w3.weight, generator, depth)


class GELU(nn.Sequential):
    """Two projections with an exact GELU between; four times the model width."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))

    def reset_parameters(self, depth: int, generator: Generator) -> None:
        """As `SwiGLU`'s."""
        first, _, second = self
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        fan_in_normal_(first.weight, generator)
        fan_in_normal_(second.weight, generator, depth)


class GemmaGeGLU(nn.Module):
    """down_proj(gelu(gate_proj) * up_proj), with biases."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = swiglu_width(dim)
        self.gate_proj = nn.Linear(dim, width)
        self.up_proj = nn.Linear(dim, width)
        self.down_proj = nn.Linear(width, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))  # type: ignore[no-any-return]

    @torch.no_grad()
    def reset_parameters(self, depth: int, generator: Generator) -> None:
        """Torch's own uniform draw: upstream defines another one and never calls it."""
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            bound = 1 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)


FEED_FORWARDS: dict[str, Callable[[int], SwiGLU | GELU | GemmaGeGLU]] = {
    "swiglu": SwiGLU,
    "swiglu_torch": SwiGLU,
    "gelu": GELU,
    "gemma_geglu": GemmaGeGLU,
}


def fan_in_normal_(weight: Tensor, generator: Generator, depth: int | None = None) -> None:
    """A truncated normal of std 1/sqrt(fan-in), divided by sqrt(2 depth) where a depth is given; in place."""
    std = 1 / math.sqrt(weight.shape[1])
    trunc_normal_(weight, std if depth is None else std / math.sqrt(2 * depth), generator)


def trunc_normal_(tensor: Tensor, std: float, generator: Generator) -> None:
    """Normal of standard deviation `std`, cut at three of them; in place."""
    nn.init.trunc_normal_(tensor, std=std, a=-3 * std, b=3 * std, generator=generator)

"""open_lm's norms by name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm computed in float32, as open_lm's `rms_norm`."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x_float = x.float()
        normed = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


# open_lm's low-precision (`lp_`) norms differ only in the dtype under autocast, which torch's own autocast
# rules decide here; in float32 they are the same function.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "default_layer_norm": nn.LayerNorm,
    "lp_layer_norm": nn.LayerNorm,
    "gain_only_layer_norm": lambda dim: nn.LayerNorm(dim, bias=False),
    "gain_only_lp_layer_norm": lambda dim: nn.LayerNorm(dim, bias=False),
    "no_wb_layer_norm": lambda dim: nn.LayerNorm(dim, elementwise_affine=False),
    "rms_norm": RMSNorm,
}

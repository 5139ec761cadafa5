"""AdamW (and Muon for pre-training a demo backbone) and the warm-up + cosine schedule (Section 2.1)."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from t2i_lm.config.sections import OptimConfig
from t2i_lm.models.token_rows import is_new_row
from t2i_lm.runtime.devices import multiplies_bfloat16


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups of the trainable parameters.

    open_lm decays everything (`decay: all`, the default); `matrices` exempts one-dimensional tensors. With `l2_sp`
    pre-trained weights decay toward their initial values (`modules/l2_sp.py`) instead of zero.
    """
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return (config.decay == "all" or parameter.ndim >= 2) and (not config.l2_sp or is_new_row(name))

    decayed = [p for name, p in trainable if decays(name, p)]
    spared = [p for name, p in trainable if not decays(name, p)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def orthogonalize(matrix_MN: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix by the quintic Newton-Schulz iteration of Muon (Jordan et al., 2024).

    In bfloat16, as `torch.optim.Muon`, or in float32 where the device would emulate bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    dtype = torch.bfloat16 if multiplies_bfloat16(matrix_MN.device.type) else torch.float32
    x_MN: Tensor = (matrix_MN if matrix_MN.shape[0] <= matrix_MN.shape[1] else matrix_MN.T).to(dtype)
    x_MN = x_MN / (x_MN.norm() + 1e-7)
    for _ in range(5):
        gram_MM = x_MN @ x_MN.T
        x_MN = a * x_MN + (b * gram_MM + c * gram_MM @ gram_MM) @ x_MN
    x_MN = x_MN.to(matrix_MN.dtype)
    return x_MN if matrix_MN.shape[0] <= matrix_MN.shape[1] else x_MN.T


class Muon(Optimizer):
    """Muon on matrices and AdamW on the rest, as the single optimizer of Lightning's automatic optimization.

    Groups have `rule: muon | adamw`. Muon's updates are scaled by 0.2 sqrt(max(M, N)), which gives them AdamW's
    root-mean-square, so both rules share a learning rate (Liu et al., 2025).
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], momentum: float = 0.95
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "momentum": momentum, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rule = self._muon if group["rule"] == "muon" else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    rule(parameter, parameter.grad, self.state[parameter], group)
        return loss

    @staticmethod
    def _muon(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        buffer = state.setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(grad, 1 - group["momentum"])
        update = orthogonalize(grad.lerp(buffer, group["momentum"]))
        parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))

    @staticmethod
    def _adamw(parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(grad, 1 - beta1)
        state["square"].lerp_(grad.square(), 1 - beta2)
        mean = state["mean"] / (1 - beta1 ** state["step"])
        root = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, root, value=-group["lr"])


def adamw(named: list[tuple[str, nn.Parameter]], config: OptimConfig) -> Optimizer:
    """Torch's fused AdamW over `decay_groups`."""
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(decay_groups(named, config), lr=config.lr, betas=betas, fused=True)


def muon(named: list[tuple[str, nn.Parameter]], config: OptimConfig) -> Optimizer:
    """Muon for the matrices inside the layers, AdamW for token rows and norms.

    Raises:
        ValueError: if none is trained.
    """
    numbered = re.compile(r"\.\d+\.")  # a layer, whatever an architecture calls them
    inside = [(name, p) for name, p in named if numbered.search(name) and p.ndim == 2 and p.requires_grad]
    if not inside:
        raise ValueError("optim.name=muon: expected adamw, since no matrix inside a layer is trained")
    names = {name for name, _ in inside}
    groups = [group | {"rule": "muon"} for group in decay_groups(inside, config)]
    rest = [(name, p) for name, p in named if name not in names]
    groups += [group | {"rule": "adamw"} for group in decay_groups(rest, config)]
    return Muon(groups, config.lr, (config.betas[0], config.betas[1]))


OPTIMIZERS: dict[str, Callable[[list[tuple[str, nn.Parameter]], OptimConfig], Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
}


def cosine_with_warmup(optimizer: Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """Linear warm-up to the peak over `warmup_steps`, then a cosine to `final_lr_ratio` of it at `max_steps`."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
        floor = config.final_lr_ratio
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)

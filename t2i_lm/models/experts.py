"""Routed experts of mixture-of-experts backbones: their stacked weights, and how many a token uses.

transformers stacks the experts of a layer: the first dimension of a weight (experts, ., .) or bias (experts, .) is the
expert.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

# Shared experts, which every token uses, are stacked too.
_EXPERTS_CLASS = re.compile(r"(?<!Shared)(Experts|NaiveMoe)$")  # the latter up to transformers 5.12
# What routers and configs call the number of experts per token.
_PER_TOKEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class ExpertWeights:
    """A stacked weight or bias of one layer.

    Attributes:
        per_token: experts that a token uses; None where neither router nor config says so.
    """

    name: str
    parameter: nn.Parameter
    per_token: int | None

    @property
    def is_matrix(self) -> bool:
        """Whether it holds a matrix per expert, not a bias."""
        return self.parameter.ndim == 3

    @property
    def inactive(self) -> int:
        """Entries that a token does not use."""
        experts = len(self.parameter)
        return self.parameter.numel() // experts * (experts - min(experts, self.per_token or experts))


def expert_weights(model: nn.Module) -> list[ExpertWeights]:
    """The stacked weights and biases of all routed experts of a model; empty for a dense one."""
    config = getattr(getattr(model, "body", None), "config", None)
    found = []
    for path, module in model.named_modules():
        if _EXPERTS_CLASS.search(type(module).__name__):
            beside = model.get_submodule(path.removesuffix(".base_layer").rpartition(".")[0])
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    found.append(ExpertWeights(f"{path}.{name}", parameter, _per_token(beside, config)))
    return found


def _per_token(layer: nn.Module, config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for holder in (*layer.modules(), text):
        for name in _PER_TOKEN:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None

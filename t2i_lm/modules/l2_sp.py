"""L2-SP: weight decay toward the initial weights (Li et al., 2018), decoupled as in AdamW."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from t2i_lm.models.token_rows import is_new_row


class Anchor(nn.Module):
    """Decay of a model's trainable pre-trained weights toward their initial values.

    Before each update p <- p - lr strength (p - p0): with AdamW, weight decay on p - p0. New rows (boundary and image)
    have no pre-trained value and keep the ordinary decay; the anchored weights have none (`optim.decay_groups`).
    The initial values are not saved: a resumed run rebuilds them from the same config.
    """

    def __init__(self, model: nn.Module, strength: float) -> None:
        """Copies the current values.

        Raises:
            ValueError: if no pre-trained weight is trainable.
        """
        super().__init__()
        self.strength = strength
        self._anchored = [p for name, p in model.named_parameters() if p.requires_grad and not is_new_row(name)]
        if not self._anchored:
            raise ValueError(f"optim.l2_sp={strength}: freeze and tune leave no pre-trained weight trainable; use 0")
        for number, parameter in enumerate(self._anchored):
            self.register_buffer(f"start_{number}", parameter.detach().clone(), persistent=False)

    @torch.no_grad()
    def pull(self, optimizer: Optimizer) -> None:
        """Decays every weight with a gradient, except in steps that the optimizer will skip (`found_inf`)."""
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        skipped: Tensor | None = getattr(optimizer, "found_inf", None)
        for parameter, start in zip(self._anchored, self.buffers(), strict=True):
            if parameter.grad is None:
                continue
            rate = rates[id(parameter)] * self.strength
            parameter.lerp_(start, rate if skipped is None else (rate * (1 - skipped)).to(parameter.dtype))

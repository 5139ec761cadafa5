"""Projection of conflicting gradients (PCGrad, Yu et al., 2020, arXiv:2001.06782) of caption-image pairs and of text.

The two losses are those of the caption-image sequences and of the replayed text (with `distil.weight`, each with the
divergence of its own text). Where the inner product of their gradients over all trained parameters is negative, each
is projected onto the normal plane of the other; their sum is the step's gradient. Without a conflict this is the
gradient of plain replay.

Cost: two smaller forward and backward passes in place of one, on the same sequences; memory for one more gradient, or
two with several micro-batches or processes; over several processes a second reduction, which does not overlap with the
backward pass.

Shapes: `B` sequences, `T` positions.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2i_lm.modules.distillation import DistilledModule
from t2i_lm.modules.text_to_image import TextToImageModule

TINY = torch.finfo(torch.float32).tiny


class GradientProjection:
    """The gradient of a second loss, summed over micro-batches, and its combination with `Parameter.grad`.

    Attributes:
        cosine: of the two gradients at the last step, 0-d; None before the first.
    """

    def __init__(self, model: nn.Module) -> None:
        """Of the model's trainable parameters."""
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._second: list[Tensor] | None = None
        self.cosine: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch's second loss; no hooks of DDP run, so that nothing is reduced."""
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        if self._second is None:
            self._second = list(found)
        else:
            torch._foreach_add_(self._second, found)

    @torch.no_grad()
    def combine(self) -> None:
        """Adds the second gradient, its mean over ranks, to the first, which is reduced; projects both on conflict.

        With g1' = g1 - w / |g2|^2 g2 and g2' = g2 - w / |g1|^2 g1, where w = min(g1 g2, 0), the sum has the factors
        1 - w / |g1|^2 and 1 - w / |g2|^2: no synchronization with the device.
        """
        second = self._second or [torch.zeros_like(parameter) for parameter in self._parameters]
        self._second = None
        if dist.is_available() and dist.is_initialized():
            whole = torch.cat([gradient.flatten() for gradient in second])
            second.clear()  # one copy less in memory during the reduction
            dist.all_reduce(whole)
            whole.div_(dist.get_world_size())
            parts = torch.split(whole, [parameter.numel() for parameter in self._parameters])
            second = [part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        first = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        dot, one, two = (_inner(*pair) for pair in ((first, second), (first, first), (second, second)))
        conflict = dot.clamp(max=0)
        factors = [1 - conflict / square.clamp(min=TINY) for square in (one, two)]
        torch._foreach_mul_(first, factors[0])
        torch._foreach_mul_(second, factors[1])
        torch._foreach_add_(first, second)
        self.cosine = dot / (one * two).sqrt().clamp(min=TINY)


def _inner(one: list[Tensor], two: list[Tensor]) -> Tensor:
    """Inner product of two gradients, 0-d float32."""
    return torch.stack([torch.sum(a * b, dtype=torch.float32) for a, b in zip(one, two, strict=True)]).sum()


class ProjectedModule(TextToImageModule):
    """Text-to-image with replay, where the gradients of pairs and of text are projected on conflict."""

    def __init__(self, *arguments: Any) -> None:
        """As the base module."""
        super().__init__(*arguments)
        self.projection = GradientProjection(self.decoder)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """In training, `targets` are of the `pairs` in the batch; `text` holds the replayed sequences and theirs."""
        if not self.training:
            return super().on_before_batch_transfer(batch, dataloader_idx)
        plain_B = batch["ids_BT"][:, 0] < self.layout.vocab.text_size
        pairs, text = (
            super(ProjectedModule, self).on_before_batch_transfer({"ids_BT": batch["ids_BT"][chosen_B]}, dataloader_idx)
            for chosen_B in (~plain_B, plain_B)
        )
        return {**batch, **pairs, "text": text}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Loss of the pairs of a micro-batch, plus the value of the text's, whose gradient is kept apart."""
        text = {**batch, **batch["text"]}
        if not len(text["ids_BT"]):
            return super().training_step(batch, batch_idx)
        outputs = super().training_step(text, batch_idx)
        # Lightning divides the loss of the pairs in the same way.
        self.projection.add(outputs["loss"] / self.config.trainer.accumulate_grad_batches)
        both = super().training_step(batch, batch_idx)
        sums = {name: both[name] + outputs[name] for name in ("nll_sum", "count")}
        return {**both, **sums, "loss": both["loss"] + outputs["loss"].detach()}

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Combines the gradients after the last micro-batch's backward pass, before anything looks at them."""
        assert optimizer_closure is not None

        def closure() -> Any:
            loss = optimizer_closure()
            self.projection.combine()
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def scalars(self) -> dict[str, Any]:
        """Cosine of both gradients at the last step, beside the base module's."""
        own: dict[str, Any] = getattr(super(), "scalars", dict)()
        cosine = self.projection.cosine
        return own if cosine is None else {**own, "gradient_cosine": float(cosine)}


class ProjectedDistilledModule(ProjectedModule, DistilledModule):
    """As `ProjectedModule`, with the divergence from the initial model in both losses."""

"""Skipping of optimizer steps with a non-finite gradient, on all ranks together."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from callbacks.base.interval_sums import distributed
from callbacks.files.event_log import EventLog


class NonFiniteGuard(Callback):
    """Leaves parameters and moments bitwise unchanged if the gradient norm is NaN or infinite on any rank.

    The step still counts for the data order and the schedule. Zeroed gradients would not suffice: the optimizer would
    still decay weights and update its moments. Two exact ways:

    - `found_inf`, if the optimizer supports it (torch's fused Adam family): the kernel itself skips the update,
      without a synchronization. Skips are counted on the device and read every `check_every` steps.
    - Otherwise, and on the CPU, gradients are set to None: torch's optimizers skip parameters without one.

    Modules may use the norm in their `gradient_norm`. Costs one all-reduce of one number per step, none on one rank.
    """

    def __init__(self, limit: int = 5, check_every: int = 50, events: EventLog | None = None) -> None:
        """Stops after `limit` skips in a row; `check_every` matters on a GPU only.

        Raises:
            ValueError: if either number is less than 1.
        """
        for name, value in (("limit", limit), ("check_every", check_every)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        self.limit, self.check_every, self.events = limit, check_every, events
        self.skipped = 0  # in the whole run, as last read
        # Skips in the run, current consecutive skips, most consecutive skips; on the device of the gradients.
        self._counts: Tensor = torch.zeros(3, dtype=torch.int64)
        self._fused: Optimizer | None = None
        self._last_check = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_check = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # Lightning calls this inside the optimizer's step, before clipping.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):  # of sharded gradients, a partial sum on every rank
            norm = norm.full_tensor()
        pl_module.gradient_norm = norm
        bad = ~norm.isfinite().reshape(1)
        flag = bad.to(torch.float32)
        if distributed():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self._count(flag)
        if self.skips_on_device(flag, optimizer):
            optimizer.found_inf = flag.reshape(())  # type: ignore[attr-defined]
            self._fused = optimizer
        elif bool(flag):
            for parameter in parameters:
                parameter.grad = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads the counts, logs skips and stops a run that only skips.

        Raises:
            FloatingPointError: on every rank, after `limit` skips in a row.
        """
        step = trainer.global_step
        if step == self._last_check or (self._counts.is_cuda and step - self._last_check < self.check_every):
            return
        skipped, _, longest = self._counts.tolist()
        if skipped > self.skipped and self.events and trainer.is_global_zero:
            text = f"{skipped - self.skipped} of steps {self._last_check + 1} to {step} skipped, {skipped} in the run"
            self.events.write("non-finite-gradient", text)
        self.skipped, self._last_check = skipped, step
        if longest >= self.limit:
            raise FloatingPointError(
                f"the gradient was not finite in {longest} steps in a row (step {step}); parameters are those before "
                "them. Continue at a lower rate (--resume RUN optim.lr=RATE --allow-mismatch optim.lr), or in float32 "
                "(--resume RUN trainer.precision=32-true --allow-mismatch trainer.precision)"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.skipped = int(self._counts[0])
        if self._fused is not None:
            del self._fused.found_inf  # type: ignore[attr-defined]
            self._fused = None

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counts = torch.tensor(state_dict["counts"], dtype=torch.int64)
        self.skipped = int(self._counts[0])

    @staticmethod
    def skips_on_device(flag: Tensor, optimizer: Optimizer) -> bool:
        """Whether the optimizer's own kernel can skip, which on a GPU avoids a synchronization."""
        return flag.is_cuda and bool(getattr(optimizer, "_step_supports_amp_scaling", False))

    def _count(self, flag: Tensor) -> None:
        skipped, row, longest = self._counts.to(flag.device).unbind()
        bad = flag.reshape(()).to(torch.int64)
        row = (row + bad) * bad
        self._counts = torch.stack([skipped + bad, row, torch.maximum(longest, row)])

"""Skipping of optimizer steps with a non-finite gradient or a loss spike, on all ranks together."""

import math
from collections.abc import Callable, Sequence
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

# Weight of the past in the moving average of the loss, and steps before a spike is told from it.
AVERAGE, WARMUP = 0.98, 50
RATE = "Continue at a lower rate (--resume RUN optim.lr=RATE --allow-mismatch optim.lr)"


class NonFiniteGuard(Callback):
    """Leaves parameters and moments bitwise unchanged if the gradient norm is NaN or infinite on any rank.

    With `skip_above`, also if the loss, the mean over ranks and micro-batches, exceeds this multiple of its moving
    average over the steps that were not skipped.

    The step still counts for the data order and the schedule. Zeroed gradients would not suffice: the optimizer would
    still decay weights and update its moments. Two exact ways:

    - `found_inf`, if the optimizer supports it (torch's fused Adam family): the kernel itself skips the update,
      without a synchronization. Skips are counted on the device and read every `check_every` steps.
    - Otherwise, and on the CPU, gradients are set to None: torch's optimizers skip parameters without one.

    Modules may use the norm in their `gradient_norm`. Costs one all-reduce per step of the losses of all micro-batches
    and a flag, none on one rank.

    Shapes: P micro-batches of a step on all ranks, in the order of the global batch (rank after rank for each
    micro-batch of a rank).
    """

    def __init__(
        self,
        limit: int = 5,
        check_every: int = 50,
        events: EventLog | None = None,
        skip_above: float | None = None,
        samples: Callable[[int], Sequence[str]] | None = None,
        warmup: int = WARMUP,
    ) -> None:
        """Stops after `limit` skips in a row; `check_every` matters on a GPU only.

        Args:
            limit: skips in a row after which the run stops.
            check_every: steps between looks at the device.
            events: names each skipped step.
            skip_above: multiple of the average loss above which a step is skipped; None: none is.
            samples: names of the samples of the global batch after a number of steps, in order.
            warmup: steps before a spike is told from the average.

        Raises:
            ValueError: if either number is less than 1, or the multiple not above 1.
        """
        for name, value in (("limit", limit), ("check_every", check_every)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if skip_above is not None and skip_above <= 1:
            raise ValueError(f"skip_above={skip_above}: expected more than 1")
        self.limit, self.check_every, self.events = limit, check_every, events
        self.skip_above, self.samples, self.warmup = skip_above, samples, warmup
        self.skipped = 0  # in the whole run, as last read
        # Skips in the run, current consecutive skips, most consecutive skips; on the device of the gradients.
        self._counts: Tensor = torch.zeros(3, dtype=torch.int64)
        # Decayed sum of the losses of steps that were not skipped, and of their weights; number of these steps.
        self._average: Tensor = torch.zeros(3)
        self._losses: list[Tensor] = []  # of this rank's micro-batches in the current step
        # Of each step since the last look: whether the gradient was bad, whether the loss was, the bound, P losses.
        self._seen: list[tuple[int, Tensor]] = []
        self._spiked = False
        self._fused: Optimizer | None = None
        self._last_check = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_check = trainer.global_step
        self._losses, self._seen = [], []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        # Lightning has divided it.
        self._losses.append(loss.detach().float().reshape(()) * trainer.accumulate_grad_batches)

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
        losses_P, flag = self._of_all_ranks(bad.to(torch.float32))
        flag, spike, bound = self._spikes(losses_P, flag)
        self._seen.append((trainer.global_step, torch.cat([flag - spike, spike, bound, losses_P])))
        self._count(flag)
        if self.skips_on_device(flag, optimizer):
            optimizer.found_inf = flag.reshape(())  # type: ignore[attr-defined]
            self._fused = optimizer
        elif bool(flag):
            for parameter in parameters:
                parameter.grad = None

    def _of_all_ranks(self, bad: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (P,) of the step, and whether any rank's gradient is bad (1,): equal on all ranks."""
        mine, self._losses = torch.stack(self._losses or [bad.new_zeros(())]).to(bad.device), []
        if not distributed():
            return mine, bad
        rank, world = dist.get_rank(), dist.get_world_size()
        shared = bad.new_zeros(len(mine) * world + 1)
        shared[rank:-1:world], shared[-1:] = mine, bad
        dist.all_reduce(shared)  # each place has one summand that is not 0
        return shared[:-1], (shared[-1:] > 0).to(torch.float32)

    def _spikes(self, losses_P: Tensor, flag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The flag of the step with a spike, the spike, and the bound that the loss exceeded, (1,) each."""
        if self.skip_above is None:
            return flag, torch.zeros_like(flag), torch.full_like(flag, math.inf)
        average = self._average.to(flag.device)
        total, weight, steps = average[:1], average[1:2], average[2:]
        loss = losses_P.mean().reshape(1)
        bound = torch.where(steps >= self.warmup, self.skip_above * total / weight, math.inf)
        spike = ((loss > bound) & (flag == 0)).to(torch.float32)
        flag = flag + spike
        new = torch.cat([total * AVERAGE + loss * (1 - AVERAGE), weight * AVERAGE + 1 - AVERAGE, steps + 1])
        self._average = torch.where((flag > 0) | ~loss.isfinite(), average, new)
        return flag, spike, bound

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
        spikes = self._tell(trainer)
        self._last_check = step
        _, row, longest = self._counts.tolist()
        # A GPU is looked at later, when other steps may have followed.
        after = "parameters are those before them" if row == longest else "later steps have changed the parameters"
        if longest >= self.limit and spikes:
            raise FloatingPointError(
                f"the loss was above {self.skip_above:g} times its average in {longest} steps in a row (step {step}); "
                f"{after}. {RATE}, or with another bound (--resume RUN "
                "trainer.skip_loss_above=MULTIPLE --allow-mismatch trainer.skip_loss_above)"
            )
        if longest >= self.limit:
            raise FloatingPointError(
                f"the gradient was not finite in {longest} steps in a row (step {step}); {after}. "
                f"{RATE}, or in float32 "
                "(--resume RUN trainer.precision=32-true --allow-mismatch trainer.precision)"
            )

    def _tell(self, trainer: pl.Trainer) -> bool:
        """Logs the steps that were skipped since the last look; whether the last one so far was a spike."""
        seen, self._seen = self._seen, []
        if not seen:
            return self._spiked
        rows = torch.stack([row for _, row in seen]).tolist()
        spiked = False
        for (step, _), (bad, spike, bound, *losses) in zip(seen, rows, strict=True):
            if not bad and not spike:
                continue
            self.skipped, spiked = self.skipped + 1, bool(spike)
            if self.events and trainer.is_global_zero:
                kind = "loss-spike" if spike else "non-finite-gradient"
                self.events.write(kind, self._describe(step, losses, bound if spike else None, trainer.world_size))
        self._spiked = spiked
        return spiked

    def _describe(self, step: int, losses: list[float], bound: float | None, world: int) -> str:
        """The text of an event: what was wrong, and with which samples."""
        total = f"; {self.skipped} in the run"
        if bound is None:
            at_fault = [part for part, loss in enumerate(losses) if not math.isfinite(loss)]
            why = "gradient not finite"
        else:
            at_fault = [part for part, loss in enumerate(losses) if not loss <= bound]
            why = f"loss {sum(losses) / len(losses):.4g} above {bound:.4g}"
        if at_fault:
            ranks = sorted({part % world for part in at_fault})
            why += f", by the loss {losses[at_fault[0]]:.4g} of rank {', '.join(map(str, ranks))}"
        names = list(self.samples(step)) if self.samples else []
        size = len(names) // len(losses)
        chosen = at_fault or range(len(losses))
        shown = [name for part in chosen for name in names[part * size : (part + 1) * size]]
        return f"step {step + 1} skipped, {why}{total}" + (f"; samples {', '.join(shown)}" if shown else "")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer)
        if self._fused is not None:
            del self._fused.found_inf  # type: ignore[attr-defined]
            self._fused = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._tell(trainer)  # a run that stops here looks no more

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts.tolist(), "average": self._average.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        skipped, row, longest = state_dict["counts"]
        if longest >= self.limit:  # it was stopped for that, and is now continued with another rate
            row = longest = 0
        self._counts = torch.tensor([skipped, row, longest], dtype=torch.int64)
        self._average = torch.tensor(state_dict.get("average", [0.0, 0.0, 0.0]))
        self.skipped = skipped

    @staticmethod
    def skips_on_device(flag: Tensor, optimizer: Optimizer) -> bool:
        """Whether the optimizer's own kernel can skip, which on a GPU avoids a synchronization."""
        return flag.is_cuda and bool(getattr(optimizer, "_step_supports_amp_scaling", False))

    def _count(self, flag: Tensor) -> None:
        skipped, row, longest = self._counts.to(flag.device).unbind()
        bad = flag.reshape(()).to(torch.int64)
        row = (row + bad) * bad
        self._counts = torch.stack([skipped + bad, row, torch.maximum(longest, row)])

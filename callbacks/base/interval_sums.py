"""Sums over one logging interval: micro-batches, optimizer steps and ranks.

S is the number of sums, W the number of ranks.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def distributed() -> bool:
    """Whether there are several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def host_group(timeout: timedelta | None) -> Any:
    """Another group of all ranks, for agreements on the host; None where the default group is one.

    `timeout` is that of its calls; None: torch's.
    """
    return dist.new_group(backend="gloo", timeout=timeout) if dist.get_backend() != "gloo" else None


def collective_device() -> torch.device:
    """Device of the tensors in a collective call."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def highest_of_ranks(value: int, group: Any = None) -> int:
    """The highest value of all ranks, in the default process group or another; every rank must call it."""
    if not distributed():
        return value
    agreed = torch.tensor(value, device=collective_device() if group is None else "cpu")
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    return int(agreed)


class IntervalSums:
    """Running float64 sums that can be checkpointed at any moment without losing or repeating anything.

    Micro-batches of an unfinished optimizer step are separate, since a resumed run repeats that step from its first
    micro-batch. The sums stay on the device of the first micro-batch, without synchronization before `take`. Integers
    are exact up to 2**53.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._step: list[Tensor] = []
        self._interval_S: Tensor | None = None

    def add(self, vector_S: Tensor) -> None:
        """Adds one micro-batch of the current step."""
        self._step.append(vector_S)

    def end_step(self) -> None:
        """Adds the current step to the interval."""
        for vector_S in self._step:
            sum_S = self._interval_S
            self._interval_S = vector_S if sum_S is None else sum_S.to(vector_S.device) + vector_S
        self._step = []

    def total(self) -> Tensor:
        """Sums of all ranks over the finished steps, on the CPU; every rank must call it."""
        mine_S = self._mine()
        if not distributed():
            return mine_S.to("cpu", copy=True)
        total_S = mine_S.to(collective_device(), copy=True)
        dist.all_reduce(total_S)
        return total_S.cpu()

    def take(self) -> Tensor:
        """As `total`, and starts a new interval."""
        total_S = self.total()
        self._interval_S = None
        return total_S

    def state(self) -> Tensor:
        """Sums of each rank over the finished steps, (W, S); every rank must call it.

        Per rank, so that a resumed run adds in the order of an uninterrupted one, to the last bit.
        """
        mine_S = self._mine()
        if not distributed():
            return mine_S.to("cpu", copy=True)[None]
        mine_S = mine_S.to(collective_device())
        rows = [torch.empty_like(mine_S) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine_S)
        return torch.stack(rows).cpu()

    def load(self, state_WS: Tensor, rank: int, world: int) -> None:
        """Restores this rank's sums; with another number of ranks the first takes them all."""
        self._step = []
        if len(state_WS) == world:
            self._interval_S = state_WS[rank]
        else:
            self._interval_S = state_WS.sum(dim=0) if rank == 0 else None

    def _mine(self) -> Tensor:
        return torch.zeros(self.size, dtype=torch.float64) if self._interval_S is None else self._interval_S


def to_double(value: Tensor | float, device: torch.device) -> Tensor:
    """A number or tensor as detached float64 on `device`, or on the CPU for MPS, which has no float64."""
    target = torch.device("cpu") if device.type == "mps" else device
    if isinstance(value, Tensor):
        return value.detach().to(target).to(torch.float64)
    return torch.full((), value, dtype=torch.float64, device=target)  # a fill, not a copy from the host

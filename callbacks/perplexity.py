"""Split perplexity, raw and EMA-smoothed, against tokens seen (Figures 3 and 4)."""

import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.contract import StepOutput, record_head
from callbacks.metrics_file import MetricsFile

# Modalities that the aggregate `all_no_boundary` leaves out: near-deterministic separators.
BOUNDARY = "boundary"


class EMASplitPerplexity(Callback):
    """Sums the loss of one logging interval over micro-batches and ranks, smooths it, writes it.

    For each modality m and the aggregates `all` and `all_no_boundary`: x = nll_sum / count over the interval,
    ema <- a ema + (1 - a) x, divided by 1 - a^n, and only then exp: exp(EMA(loss)), not EMA(exp(loss)).
    A modality without targets in an interval leaves its average as it is.

    Attributes:
        seen: samples and tokens trained on so far, over all ranks.
    """

    def __init__(self, interval: int, alpha: float = 0.95, metrics_path: Path | None = None) -> None:
        """`interval` counts optimiser steps. Rank 0 writes lines to `metrics_path`, if given.

        Raises:
            ValueError: if `interval` or `alpha` is out of range.
        """
        if interval < 1:
            raise ValueError(f"interval={interval}: expected at least 1")
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha={alpha}: expected a value in [0, 1)")
        self.interval, self.alpha = interval, alpha
        self.file = MetricsFile(metrics_path) if metrics_path else None
        self.seen = {"samples": 0, "tokens_nominal": 0, "tokens_real": 0}
        self.latest: dict[str, float] = {}
        self._ema: dict[str, float] = {}
        self._updates: dict[str, int] = {}
        self._train = _Sums()
        self._val = _Sums()
        self._last_step = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds a micro-batch; at the end of an interval reduces, smooths and writes."""
        self._train.add(outputs)
        step = trainer.global_step
        if step == self._last_step or step % self.interval:
            return
        self._last_step = step
        nll_sum_M, count_M = self._take(self._train)
        values = _modalities(pl_module.modalities, nll_sum_M, count_M)  # type: ignore[arg-type]
        for name, entry in values.items():
            if entry["count"]:
                ema = self.alpha * self._ema.get(name, 0.0) + (1 - self.alpha) * entry["nll"]
                self._ema[name], self._updates[name] = ema, self._updates.get(name, 0) + 1
                entry["nll_ema"] = ema / (1 - self.alpha ** self._updates[name])
                entry["ppl_ema"] = _exp(entry["nll_ema"])
        self.latest = {name: entry["nll"] for name, entry in values.items() if "nll" in entry}
        self._write(trainer, "train", values, {"interval": self.interval, "ema": self.alpha})

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets the last validation."""
        self._val = _Sums()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds a validation batch."""
        self._val.add(outputs)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the exact validation loss: sums over the whole set and all ranks."""
        if not trainer.sanity_checking:
            nll_sum_M, count_M = _reduce(*self._val.totals())[:2]
            self._write(trainer, "val", _modalities(pl_module.modalities, nll_sum_M, count_M), {})  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Averages, counters and the partial interval, reduced over ranks (called on every rank)."""
        nll_sum_M, count_M = self._take(self._train)
        if _rank() == 0:
            self._train.nll_sum, self._train.count = nll_sum_M, count_M
        return {
            "ema": dict(self._ema),
            "updates": dict(self._updates),
            "seen": dict(self.seen),
            "last_step": self._last_step,
            "nll_sum": None if nll_sum_M is None else nll_sum_M.cpu(),
            "count": None if count_M is None else count_M.cpu(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the averages; the partial interval goes to rank 0."""
        self._ema, self._updates = dict(state_dict["ema"]), dict(state_dict["updates"])
        self.seen, self._last_step = dict(state_dict["seen"]), int(state_dict["last_step"])
        self._train = _Sums()
        if _rank() == 0:
            self._train.nll_sum, self._train.count = state_dict["nll_sum"], state_dict["count"]

    def _take(self, sums: "_Sums") -> tuple[Tensor | None, Tensor | None]:
        """Reduces an interval's sums over ranks, books its tokens and starts a new interval."""
        nll_sum_M, count_M, seen = _reduce(*sums.totals())
        for name, value in zip(self.seen, seen.tolist(), strict=True):
            self.seen[name] += int(value)
        self._train = _Sums()
        return nll_sum_M, count_M

    def _write(self, trainer: pl.Trainer, key: str, values: dict[str, dict[str, float]], extra: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        record = {**record_head(trainer, self.seen), key: values, **extra, "time": time.time()}
        if self.file:
            self.file.append(record)
        scalars = {
            f"{key}/{name}/{field}": value
            for name, entry in values.items()
            for field, value in entry.items()
            if field not in ("nll_sum", "count")
        }
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=self.seen["tokens_nominal"])


class _Sums:
    """Sums of step outputs on their device."""

    def __init__(self) -> None:
        self.nll_sum: Tensor | None = None
        self.count: Tensor | None = None
        self.samples = self.tokens_nominal = 0
        self.tokens_real: Tensor | int = 0

    def add(self, output: StepOutput) -> None:
        nll_sum, count = output["nll_sum"].detach().double(), output["count"].detach()
        if self.nll_sum is not None and self.count is not None:
            nll_sum, count = nll_sum + self.nll_sum.to(nll_sum.device), count + self.count.to(count.device)
        self.nll_sum, self.count = nll_sum, count
        self.samples += output["samples"]
        self.tokens_nominal += output["tokens_nominal"]
        self.tokens_real = output["tokens_real"] + self.tokens_real

    def totals(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        seen = torch.tensor([self.samples, self.tokens_nominal, int(self.tokens_real)], dtype=torch.int64)
        return self.nll_sum, self.count, seen


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _reduce(nll_sum: Tensor | None, count: Tensor | None, seen: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Sums over ranks; a rank without a batch yet cannot know M and asks for none of its own to count."""
    if not (dist.is_available() and dist.is_initialized()):
        return nll_sum, count, seen
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    size = torch.tensor([0 if nll_sum is None else len(nll_sum)], device=device)
    dist.all_reduce(size, op=dist.ReduceOp.MAX)
    seen = seen.to(device)
    dist.all_reduce(seen)
    if not int(size):
        return None, None, seen.cpu()
    nll_sum = torch.zeros(int(size), dtype=torch.float64, device=device) if nll_sum is None else nll_sum.to(device)
    count = torch.zeros(int(size), dtype=torch.int64, device=device) if count is None else count.to(device)
    dist.all_reduce(nll_sum)
    dist.all_reduce(count)
    return nll_sum, count, seen.cpu()


def _modalities(
    names: tuple[str, ...], nll_sum_M: Tensor | None, count_M: Tensor | None
) -> dict[str, dict[str, float]]:
    """Entries of each modality and of the two aggregates."""
    assert nll_sum_M is not None
    assert count_M is not None
    sums = dict(zip(names, nll_sum_M.tolist(), strict=True))
    counts = dict(zip(names, count_M.tolist(), strict=True))
    if len(names) > 1:
        inner = [name for name in names if name != BOUNDARY]
        for total, parts in (("all", names), ("all_no_boundary", inner)):
            sums[total] = sum(sums[name] for name in parts)
            counts[total] = sum(counts[name] for name in parts)
    values = {}
    for name, count in counts.items():
        values[name] = {"nll_sum": sums[name], "count": count}
        if count:
            nll = sums[name] / count
            values[name] |= {"nll": nll, "ppl": _exp(nll)}
    return values


def _exp(nll: float) -> float:
    """exp, capped where a float would overflow."""
    return math.exp(min(nll, 700.0))

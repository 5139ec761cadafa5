"""Split perplexity, raw and EMA-smoothed, against tokens seen (Figures 3 and 4).

M is the number of modalities, S = 3 M + 3 the number of sums: nll (M), count (M), micro-batches skipped for a
non-finite loss (M), samples, tokens_nominal, tokens_real.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.base.contract import Extras, StepOutput, record_head
from callbacks.base.interval_sums import IntervalSums, to_double
from callbacks.base.tags import loss_tags, more_tags
from callbacks.files.metrics_file import MetricsFile

# The modality that the aggregate `all_no_boundary` excludes: near-deterministic separators.
BOUNDARY = "boundary"
SEEN = ("samples", "tokens_nominal", "tokens_real")


class EMASplitPerplexity(Callback):
    """Sums the loss of one logging interval over micro-batches and ranks, smooths it, writes it.

    For each modality m and the aggregates `all` and `all_no_boundary`: x = nll_sum / count over the interval,
    ema <- a ema + (1 - a) x, divided by 1 - a^n, and only then exp: exp(EMA(loss)), not EMA(exp(loss)).
    A modality without targets in an interval keeps its average. Micro-batches with a non-finite loss are skipped, and
    their number is written. Ranks communicate, and the device is synchronized, once per interval.

    Attributes:
        seen: samples and tokens trained on so far, over all ranks; current at every written line.
        latest: the interval's nll of each modality and aggregate.
    """

    def __init__(
        self,
        interval: int,
        alpha: float = 0.95,
        metrics_path: Path | None = None,
        extras: Sequence[Extras] = (),
        validations: Sequence[str] = ("val",),
        tag_prefix: str = "",
    ) -> None:
        """`interval` counts optimizer steps. Rank 0 writes lines, with those `extras`, to `metrics_path`.

        `validations` are the names of the validation loaders, in their order. `tag_prefix` precedes the names of losses
        in the loggers, so that runs of several tasks share a dashboard.

        Raises:
            ValueError: if `interval` or `alpha` is out of range.
        """
        if interval < 1:
            raise ValueError(f"interval={interval}: expected at least 1")
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha={alpha}: expected a value in [0, 1)")
        self.interval, self.alpha, self.extras, self.validations = interval, alpha, extras, tuple(validations)
        self.tag_prefix = tag_prefix
        self.file = MetricsFile(metrics_path) if metrics_path else None
        self.seen = dict.fromkeys(SEEN, 0)
        self.latest: dict[str, float] = {}
        self._ema: dict[str, float] = {}
        self._updates: dict[str, int] = {}
        self._last_step = 0
        self._train, self._val = IntervalSums(0), list[IntervalSums]()
        self._rank, self._world = 0, 1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Allocates sums for the module's modalities.

        Raises:
            ValueError: if the module has none.
        """
        names = getattr(pl_module, "modalities", ())
        if not names:
            raise ValueError(f"{type(pl_module).__name__}.modalities={names!r}: expected at least one name")
        size = 3 * len(names) + 3
        if self._train.size != size:  # a later `validate` on the same Trainer keeps the counts
            self._train, self._val = IntervalSums(size), []
        self._rank, self._world = trainer.global_rank, trainer.world_size

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._train.add(_vector(outputs))
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        self._train.end_step()
        if step % self.interval:
            return
        total_S = self._train.take()
        self.seen = self._seen_with(total_S)
        values = split_entries(pl_module.modalities, total_S)  # type: ignore[arg-type]
        for name, entry in values.items():
            if "nll" in entry:
                ema = self.alpha * self._ema.get(name, 0.0) + (1 - self.alpha) * entry["nll"]
                self._ema[name], self._updates[name] = ema, self._updates.get(name, 0) + 1
                entry["nll_ema"] = ema / (1 - self.alpha ** self._updates[name])
                entry["ppl_ema"] = _exp(entry["nll_ema"])
        self.latest = {name: entry["nll"] for name, entry in values.items() if "nll" in entry}
        more: dict[str, Any] = {"interval": self.interval, "ema": self.alpha}
        scalars: Any = getattr(pl_module, "scalars", None)
        if scalars is not None:
            more["scalars"] = {name: value for name, value in scalars().items() if math.isfinite(value)}
        for extra in self.extras:
            more |= extra.record(self.seen)
        self._write(trainer, {"train": values}, self.seen, more)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._val = [IntervalSums(self._train.size) for _ in self.validations]

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._val[dataloader_idx].add(_vector(outputs))
        self._val[dataloader_idx].end_step()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the exact loss of every validation split: sums over the whole split and all ranks.

        A sanity check counts as the validation of step 0 where it covers the whole set (`num_sanity_val_steps=-1`).
        """
        if trainer.sanity_checking and not math.isinf(trainer.num_sanity_val_steps):
            return
        values = {
            split: split_entries(pl_module.modalities, sums.take())  # type: ignore[arg-type]
            for split, sums in zip(self.validations, self._val, strict=True)
        }
        self._write(trainer, values, self._seen_with(self._train.total()), {})

    def head(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The first fields of a line, as of this step; every rank must call it."""
        return record_head(trainer, self._seen_with(self._train.total()))

    def state_dict(self) -> dict[str, Any]:
        """Averages, counters and the partial interval of every rank; every rank must call it."""
        return {
            "ema": dict(self._ema),
            "updates": dict(self._updates),
            "seen": dict(self.seen),
            "interval_WS": self._train.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ema, self._updates = dict(state_dict["ema"]), dict(state_dict["updates"])
        self.seen = dict(state_dict["seen"])
        self._train.load(state_dict["interval_WS"], self._rank, self._world)

    def _seen_with(self, total_S: Tensor) -> dict[str, int]:
        """Samples and tokens including those of `total_S`."""
        return {name: self.seen[name] + int(more) for name, more in zip(SEEN, total_S[-3:].tolist(), strict=True)}

    def _write(
        self,
        trainer: pl.Trainer,
        values: dict[str, dict[str, dict[str, float]]],
        seen: dict[str, int],
        more: dict[str, Any],
    ) -> None:
        if not trainer.is_global_zero:
            return
        head = record_head(trainer, seen)
        if self.file:
            self.file.append({**head, **values, **more, "time": time.time()})
        scalars = loss_tags(values, self.tag_prefix, trainer.global_step / trainer.max_steps)
        scalars |= more_tags(more, head["lr"], self.tag_prefix)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=seen["tokens_nominal"])


def _vector(output: StepOutput) -> Tensor:
    """The S sums of a micro-batch."""
    device = output["nll_sum"].device
    nll_sum_M, count_M = to_double(output["nll_sum"], device), to_double(output["count"], device)
    finite_M = nll_sum_M.isfinite()
    zero_M = torch.zeros_like(nll_sum_M)
    seen = [to_double(output[name], device) for name in SEEN]  # type: ignore[literal-required]
    return torch.cat(
        [
            torch.where(finite_M, nll_sum_M, zero_M),
            torch.where(finite_M, count_M, zero_M),
            (~finite_M).double(),
            torch.stack(seen),
        ]
    )


def _aggregates(names: Sequence[str]) -> dict[str, list[str]]:
    """Modalities of each aggregate; a single modality has no aggregate."""
    totals = {"all": list(names)} if len(names) > 1 else {}
    if BOUNDARY in names:
        totals["all_no_boundary"] = [name for name in names if name != BOUNDARY]
    return totals


def split_entries(names: Sequence[str], total_S: Tensor) -> dict[str, dict[str, float]]:
    """Fields of each modality and aggregate: `nll_sum`, `count`, and with any targets `nll`, `ppl`.

    Args:
        names: M modalities.
        total_S: sums of nll, counts of targets and counts of non-finite losses, M each.
    """
    size = len(names)
    nll_sums, counts, skipped = (
        dict(zip(names, part.tolist(), strict=True)) for part in total_S[: 3 * size].reshape(3, size)
    )
    for total, parts in _aggregates(names).items():
        for sums in (nll_sums, counts, skipped):
            sums[total] = sum(sums[name] for name in parts)
    values: dict[str, dict[str, float]] = {}
    for name in nll_sums:
        entry: dict[str, float] = {"nll_sum": nll_sums[name], "count": int(counts[name])}
        if counts[name]:
            nll = nll_sums[name] / counts[name]
            entry |= {"nll": nll, "ppl": _exp(nll)}
        if skipped[name]:
            entry["nonfinite"] = int(skipped[name])
        values[name] = entry
    return values


def _exp(nll: float) -> float:
    """exp, capped before a float overflows."""
    return math.exp(min(nll, 700.0))

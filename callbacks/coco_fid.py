"""Frechet and kernel distance to COCO at intervals of a run.

B is the number of images per batch, D the width of a feature, W the number of ranks.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.base.interval_sums import collective_device, distributed, highest_of_ranks
from callbacks.base.periodic import MEASUREMENT, Periodic, undisturbed
from callbacks.files.atomic import write_atomic
from callbacks.files.disk import tell
from callbacks.metrics.frechet import FeatureDistance, kernel_distance
from callbacks.metrics.inception import Inception
from callbacks.perplexity import EMASplitPerplexity
from callbacks.preemption import Preemption

# (network, rank, world) -> this rank's reference features: (image numbers, features (B, D)), each image on one rank.
Reference = Callable[[Inception, int, int], Iterator[tuple[Sequence[int], Tensor]]]


@dataclass(frozen=True)
class FidTask:
    """Prompts, generation and reference of an FID measurement.

    Attributes:
        prompts: number of prompts.
        sample: images (B, 3, H, W) uint8 for prompt numbers, from the current module and random generators of its own.
            It raises a FloatingPointError where the module's logits are not finite.
        reference: features of the real images.
        card: everything that the number depends on, and under `title` the number's name. Called at each measurement,
            since a trainer may change how the module computes after a run is set up.
        batch: prompts per batch; batches always consist of the same prompts.
    """

    prompts: int
    sample: Callable[[Sequence[int]], Tensor]
    reference: Reference
    card: Callable[[], dict[str, Any]]
    batch: int = 64


class CocoFID(Periodic):
    """Measures FID and KID of the samples for all prompts every `interval` optimizer steps, on all ranks.

    Writes FOLDER/step-NNNNNNNN.json with the card, and `fid` (fid, kid, kid_std, n, title) to metrics.jsonl and the
    loggers. Network and sums are not part of the module, so checkpoints do not contain them. The subsets of the kernel
    distance come from all reference images, whose features rank 0 keeps (0.3 GB for val2014). Each batch is generated
    by one rank, so the value does not depend on the number of ranks. On a request to stop, the measurement is abandoned
    after the current batch; the checkpoint says so, and the resumed run measures first. A model that has diverged, and
    cannot be sampled from, is told on stderr and not measured.
    """

    def __init__(
        self,
        interval: int,
        task: FidTask,
        network: Inception,
        folder: Path | None = None,
        meter: EMASplitPerplexity | None = None,
        preemption: Preemption | None = None,
    ) -> None:
        """`meter` writes the line; `preemption` requests a stop.

        Raises:
            ValueError: if `interval` is not positive or there are fewer than two prompts.
        """
        super().__init__(interval)
        if task.prompts < 2:
            raise ValueError(f"prompts={task.prompts}: a Frechet distance requires at least 2")
        self.task, self.network = task, network
        self.folder, self.meter, self.preemption = folder, meter, preemption
        self.latest: dict[str, Any] | None = None
        # Whether the latest measurement was abandoned; the first fields of its line, until it is made up for.
        self._abandoned = False
        self._pending: dict[str, Any] | None = None
        self._real: FeatureDistance | None = None
        self._real_ND: Tensor | None = None  # on rank 0

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        self._measure_and_write(trainer, pl_module, self.meter.head(trainer) if self.meter else {"step": step})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures what the last session abandoned: the weights are restored, and its step has no later line yet.

        Not in `on_train_start`, which a run that resumes after its last step does not reach.
        """
        if self._pending is None:
            return
        if self.preemption is not None:
            self.preemption.saver.cut_metrics(trainer)
        with trainer.profiler.profile(MEASUREMENT):  # type: ignore[attr-defined]
            self._measure_and_write(trainer, pl_module, self._pending)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._pending is None else {"pending": dict(self._pending)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict.get("pending")

    def _measure_and_write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, head: dict[str, Any]) -> None:
        """Measures the current module as that of the step of `head`, the first fields of its line."""
        self._abandoned = False
        with undisturbed(pl_module):
            result = self.measure(trainer, pl_module.device)
        self._pending = head if self._abandoned else None
        self.latest = result
        if result is None or not trainer.is_global_zero:
            return
        if self.folder is not None:
            content = json.dumps({**result, "card": self.task.card()}, indent=2) + "\n"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomic(self.folder / f"step-{head['step']:08d}.json", content.encode())
            except OSError as error:  # the numbers are in metrics.jsonl
                tell(f"{error}; training continues")
        if self.meter and self.meter.file:
            self.meter.file.append({**head, "fid": result})
        for logger in trainer.loggers:
            scalars = {f"fid/{name}": result[name] for name in ("fid", "kid")}
            logger.log_metrics(scalars, step=head.get("tokens_nominal", head["step"]))

    def measure(self, trainer: pl.Trainer, device: torch.device) -> dict[str, Any] | None:
        """The distances of the current module; None if asked to stop or without samples. Every rank must call it."""
        rank, world = trainer.global_rank, trainer.world_size
        task, network = self.task, self.network
        network.to(torch.device("cpu") if device.type == "mps" else device)
        try:
            metric = self._with_reference(rank, world)
            metric.update(torch.empty(0, network.width), real=False)  # a rank may have no batch
            prompts = range(task.prompts)
            batches = [prompts[start : start + task.batch] for start in range(0, task.prompts, task.batch)]
            rows, failure = FeatureRows(), None
            for turn in range(0, len(batches), world):  # equally often on every rank: `asked` is a collective call
                if self.preemption is not None and self.preemption.asked():
                    self._abandoned = True
                    return None
                if turn + rank < len(batches) and failure is None:
                    numbers = batches[turn + rank]
                    try:
                        features_BD = network(task.sample(numbers))
                    except FloatingPointError as error:
                        failure = error
                        continue
                    metric.update(features_BD, real=False)
                    rows.add(numbers, features_BD)
        finally:
            network.to(torch.device("cpu"))  # frees device memory for training
        if failure is not None:
            tell(f"no FID: {failure}; training continues")
        if highest_of_ranks(int(failure is not None)):
            return None
        metric.to(collective_device() if distributed() else torch.device("cpu"))
        distance = float(metric.compute())
        kid, deviation = self._kernel_distance(rows.gathered())
        title = task.card().get("title", "FID")
        return {"fid": distance, "kid": kid, "kid_std": deviation, "n": task.prompts, "title": title}

    def _kernel_distance(self, fake_ND: Tensor | None) -> tuple[float, float]:
        """Mean and deviation, computed on rank 0 and broadcast."""
        result_2 = torch.zeros(2, dtype=torch.float64)
        if fake_ND is not None:
            assert self._real_ND is not None
            result_2 = torch.tensor(kernel_distance(fake_ND, self._real_ND), dtype=torch.float64)
        if distributed():
            result_2 = result_2.to(collective_device())
            torch.distributed.broadcast(result_2, 0)
        kid, deviation = result_2.tolist()
        return kid, deviation

    def _with_reference(self, rank: int, world: int) -> FeatureDistance:
        """A metric with the sums of this rank's share of the reference, which is read once, and no samples."""
        if self._real is None:
            self._real, rows = FeatureDistance(self.network.width, reset_real_features=False), FeatureRows()
            for numbers, features_BD in self.task.reference(self.network, rank, world):
                self._real.update(features_BD, real=True)
                rows.add(numbers, features_BD)
            self._real_ND = rows.gathered()
        self._real.to(torch.device("cpu"))
        self._real.reset()
        return self._real


class FeatureRows:
    """Numbered features of this rank, gathered in an order that does not depend on the number of ranks."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._features: list[Tensor] = []

    def add(self, numbers: Sequence[int], features_BD: Tensor) -> None:
        self._numbers += numbers
        self._features.append(features_BD)

    def gathered(self) -> Tensor | None:
        """All ranks' features (N, D) by number on rank 0, None on others; every rank must call it."""
        own: tuple[list[int], Tensor | None] = self._numbers, torch.cat(self._features) if self._features else None
        parts = [own]
        if distributed():
            first = torch.distributed.get_rank() == 0
            parts = [own] * torch.distributed.get_world_size()
            torch.distributed.gather_object(own, parts if first else None)
            if not first:
                return None
        numbers = [number for part, _ in parts for number in part]
        features_ND = torch.cat([features_BD for _, features_BD in parts if features_BD is not None])
        return features_ND[torch.tensor(numbers).argsort()]

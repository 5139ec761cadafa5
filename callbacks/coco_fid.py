"""Frechet and kernel distance to COCO at intervals of a run.

B is the number of images drawn together, D the width of a feature, W the number of ranks.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.base.interval_sums import collective_device, distributed
from callbacks.base.periodic import Periodic, undisturbed
from callbacks.metrics.frechet import FeatureDistance, kernel_distance
from callbacks.metrics.inception import Inception
from callbacks.perplexity import EMASplitPerplexity
from callbacks.preemption import Preemption

# Reference features of this rank of so many: (numbers, features (B, D)), each image once over all ranks.
Reference = Callable[[Inception, int, int], Iterator[tuple[Sequence[int], Tensor]]]


@dataclass(frozen=True)
class FidTask:
    """What a run is compared with.

    Attributes:
        prompts: how many prompts there are.
        draw: images (B, 3, H, W) uint8 of the module as it is, for prompt numbers; from random streams of its own.
        reference: features of the real images.
        card: everything that the number depends on, and under `title` what it may be called. Asked at each
            measurement, as the module is then: a trainer may change how it computes after a run is set up.
        batch: prompts drawn at once, always the same ones.
    """

    prompts: int
    draw: Callable[[Sequence[int]], Tensor]
    reference: Reference
    card: Callable[[], dict[str, Any]]
    batch: int = 64


class CocoFID(Periodic):
    """Draws every prompt on some rank every `interval` optimizer steps and compares the features with the reference's.

    Network and sums live here, not in the module, so no checkpoint holds them. Writes FOLDER/step-NNNNNNNN.json with
    the card, and `fid` (fid, kid, kid_std, n, title) to metrics.jsonl and the loggers. The subsets of the kernel
    distance are drawn from all reference images, whose features rank 0 keeps (0.3 GB of val2014's). A batch is drawn
    whole by one rank, so the value does not depend on how many there are. A run that is asked to stop gives the
    measurement up after the batch at hand.
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
        """`meter` opens and writes the line; `preemption` says when to give up.

        Raises:
            ValueError: if `interval` is not positive or there are fewer than two prompts.
        """
        super().__init__(interval)
        if task.prompts < 2:
            raise ValueError(f"prompts={task.prompts}: a Frechet distance needs at least 2")
        self.task, self.network = task, network
        self.folder, self.meter, self.preemption = folder, meter, preemption
        self.latest: dict[str, Any] | None = None
        self._real: FeatureDistance | None = None
        self._real_ND: Tensor | None = None  # on rank 0

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Measures, and writes the number with its card."""
        head = self.meter.head(trainer) if self.meter else {"step": step}  # every rank must ask
        with undisturbed(pl_module):
            found = self.measure(trainer, pl_module.device)
        self.latest = found
        if found is None or not trainer.is_global_zero:
            return
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step-{step:08d}.json"
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps({**found, "card": self.task.card()}, indent=2) + "\n")
            partial.replace(path)
        if self.meter and self.meter.file:
            self.meter.file.append({**head, "fid": found})
        for logger in trainer.loggers:
            scalars = {f"fid/{name}": found[name] for name in ("fid", "kid")}
            logger.log_metrics(scalars, step=head.get("tokens_nominal", step))

    def measure(self, trainer: pl.Trainer, device: torch.device) -> dict[str, Any] | None:
        """The distances of the module as it is; None where the run was asked to stop. Every rank must call it."""
        rank, world = trainer.global_rank, trainer.world_size
        task, network = self.task, self.network
        network.to(torch.device("cpu") if device.type == "mps" else device)
        try:
            metric = self._with_reference(rank, world)
            metric.update(torch.empty(0, network.width), real=False)  # a rank may have no batch
            every = range(task.prompts)
            batches = [every[start : start + task.batch] for start in range(0, task.prompts, task.batch)]
            kept = Rows()
            for turn in range(0, len(batches), world):  # as many on every rank: they agree in each
                if self.preemption is not None and self.preemption.asked():
                    return None
                if turn + rank < len(batches):
                    numbers = batches[turn + rank]
                    features_BD = network(task.draw(numbers))
                    metric.update(features_BD, real=False)
                    kept.add(numbers, features_BD)
        finally:
            network.to(torch.device("cpu"))  # leaves the device to training
        metric.to(collective_device() if distributed() else torch.device("cpu"))
        distance = float(metric.compute())
        kid, deviation = self._kernel_distance(kept.gathered())
        named = {"n": task.prompts, "title": task.card().get("title", "FID")}
        return {"fid": distance, "kid": kid, "kid_std": deviation, **named}

    def _kernel_distance(self, drawn_ND: Tensor | None) -> tuple[float, float]:
        """Mean and deviation, which rank 0 computes and tells the others."""
        found_2 = torch.zeros(2, dtype=torch.float64)
        if drawn_ND is not None:
            assert self._real_ND is not None
            found_2 = torch.tensor(kernel_distance(drawn_ND, self._real_ND), dtype=torch.float64)
        if distributed():
            found_2 = found_2.to(collective_device())
            torch.distributed.broadcast(found_2, 0)
        kid, deviation = found_2.tolist()
        return kid, deviation

    def _with_reference(self, rank: int, world: int) -> FeatureDistance:
        """Sums with this rank's share of the reference, which is read once, and nothing drawn."""
        if self._real is None:
            self._real, kept = FeatureDistance(self.network.width, reset_real_features=False), Rows()
            for numbers, features_BD in self.task.reference(self.network, rank, world):
                self._real.update(features_BD, real=True)
                kept.add(numbers, features_BD)
            self._real_ND = kept.gathered()
        self._real.to(torch.device("cpu"))
        self._real.reset()
        return self._real


class Rows:
    """Numbered features of this rank, which come back in one order on any number of ranks."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._features: list[Tensor] = []

    def add(self, numbers: Sequence[int], features_BD: Tensor) -> None:
        """Keeps some."""
        self._numbers += numbers
        self._features.append(features_BD)

    def gathered(self) -> Tensor | None:
        """All ranks' features (N, D), by number, on rank 0, and None on the others; every rank must call it."""
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

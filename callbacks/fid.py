"""Frechet and kernel distance to COCO at intervals of a run.

B is the number of pictures drawn together, D the width of a feature, W the number of ranks.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.frechet import FeatureDistance, kernel_distance
from callbacks.inception import Inception
from callbacks.interval import collective_device, distributed
from callbacks.periodic import Periodic, undisturbed
from callbacks.perplexity import EMASplitPerplexity
from callbacks.preemption import Preemption

# Reference features of this rank of so many: (numbers, features (B, D)), each picture once over all ranks.
Reference = Callable[[Inception, int, int], Iterator[tuple[Sequence[int], Tensor]]]


@dataclass(frozen=True)
class FidTask:
    """What a run is compared with.

    Attributes:
        prompts: how many prompts there are.
        draw: pictures (B, 3, H, W) uint8 of the module as it is, for prompt numbers; from random streams of its own.
        reference: features of the real pictures.
        card: everything that the number depends on, and under `title` what it may be called.
        batch: prompts drawn at once.
    """

    prompts: int
    draw: Callable[[Sequence[int]], Tensor]
    reference: Reference
    card: dict[str, Any]
    batch: int = 64


class CocoFID(Periodic):
    """Draws every prompt on some rank every `interval` optimiser steps and compares the features with the reference's.

    Network and sums live here, not in the module, so no checkpoint holds them. Writes FOLDER/step-NNNNNNNN.json with
    the card, and `fid` (fid, kid, kid_std, n, title) to metrics.jsonl and the loggers. The value does not depend on the
    number of ranks. A run that is asked to stop gives the measurement up after the batch at hand.
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
        self._real_kept: Rows = Rows()

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
            partial.write_text(json.dumps({**found, "card": self.task.card}, indent=2) + "\n")
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
        if task.prompts < world:
            raise ValueError(f"prompts={task.prompts}: expected at least one for each of {world} ranks")
        network.to(torch.device("cpu") if device.type == "mps" else device)
        try:
            metric = self._with_reference(rank, world)
            mine = list(range(rank, task.prompts, world))
            kept = Rows()
            most = len(range(0, task.prompts, world))  # as many turns on every rank: they agree in each
            for start in range(0, most, task.batch):
                if self.preemption is not None and self.preemption.asked():
                    return None
                numbers = mine[start : start + task.batch]
                if numbers:
                    features_BD = network(task.draw(numbers))
                    metric.update(features_BD, real=False)
                    kept.add(numbers, features_BD)
        finally:
            network.to(torch.device("cpu"))  # leaves the device to training
        metric.to(collective_device() if distributed() else torch.device("cpu"))
        distance = float(metric.compute())
        kid, deviation = kernel_distance(kept.gathered(), self._real_kept.gathered())
        named = {"n": task.prompts, "title": task.card.get("title", "FID")}
        return {"fid": distance, "kid": kid, "kid_std": deviation, **named}

    def _with_reference(self, rank: int, world: int) -> FeatureDistance:
        """Sums with this rank's share of the reference, which is read once, and nothing drawn."""
        if self._real is None:
            self._real = FeatureDistance(self.network.width, reset_real_features=False)
            for numbers, features_BD in self.task.reference(self.network, rank, world):
                self._real.update(features_BD, real=True)
                # As many as are drawn suffice for the kernel distance, which is unbiased.
                within = [row for row, number in enumerate(numbers) if number < self.task.prompts]
                self._real_kept.add([numbers[row] for row in within], features_BD[within])
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

    def gathered(self) -> Tensor:
        """All ranks' features (N, D), by number; every rank must call it."""
        own: tuple[list[int], Tensor | None] = self._numbers, torch.cat(self._features) if self._features else None
        parts = [own]
        if distributed():
            parts = [own] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, own)
        numbers = [number for part, _ in parts for number in part]
        features_ND = torch.cat([features_BD for _, features_BD in parts if features_BD is not None])
        return features_ND[torch.tensor(numbers).argsort()]

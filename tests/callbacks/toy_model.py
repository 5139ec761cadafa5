"""A toy model and its data, sampling from every random stream that a run may use, and failing where the test says.

B is batch, T tokens, V vocabulary, M modalities.
"""

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, Dataset, Sampler

MODALITIES = ("text", "image", "boundary")
# Two ranks get 4 and 3 validation batches.
VOCABULARY, LENGTH, TRAIN, VALIDATION = 12, 9, 50, 25
OUTPUT = "output.txt"


@dataclass
class Toy:
    """A run, and the harm done to it."""

    folder: Path
    steps: int = 24
    batch_size: int = 8  # global
    accumulate: int = 2
    save_every: int = 5
    keep_steps: tuple[int, ...] = ()
    background: bool = True
    val_every: int = 6
    interval: int = 4
    rank: int = 0
    world: int = 1
    port: int = 0
    strategy: str = "ddp"  # of several ranks, or `fsdp2`
    validations: tuple[str, ...] = ("val",)  # names of the validation loaders
    plain: bool = False  # uses no random numbers, so that runs on different numbers of ranks can be compared
    harm: dict[str, Any] = field(default_factory=dict)
    rank_s: float = 0.0  # time-out of a watch over the ranks; 0: none

    @property
    def log(self) -> Path:
        """Output of this rank's process."""
        return self.folder / (OUTPUT if self.rank == 0 else f"{OUTPUT}.{self.rank}")

    def sleep_here(self, where: str, step: int) -> None:
        """Stands still, if `harm` says so."""
        harm = self.harm
        if harm.get("sleep_in") == where and step == harm["at_step"] and self.rank in harm.get("ranks", [0]):
            time.sleep(harm["seconds"])


class Positions(Sampler[list[int]]):
    """Micro-batches from `consumed` samples to the end of the run: one permutation for each pass over the data."""

    def __init__(self, toy: Toy, consumed: int) -> None:
        self.toy, self.consumed = toy, consumed

    def __len__(self) -> int:
        return self.toy.steps * self.toy.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        toy = self.toy
        micro = toy.batch_size // (toy.world * toy.accumulate)
        for start in range(self.consumed, toy.steps * toy.batch_size, toy.batch_size):
            toy.sleep_here("loader", start // toy.batch_size)
            for part in range(toy.accumulate):
                first = start + (part * toy.world + toy.rank) * micro
                yield [self._index(position) for position in range(first, first + micro)]

    @staticmethod
    def _index(position: int) -> int:
        epoch, offset = divmod(position, TRAIN)
        return int(np.random.default_rng(epoch).permutation(TRAIN)[offset])


class Rows(Dataset[Tensor]):
    """Rows of ids; with `noise`, one id of each batch comes from the process's own random stream."""

    def __init__(self, size: int, seed: int, noise: bool) -> None:
        self.ids = torch.randint(VOCABULARY, (size, LENGTH), generator=torch.Generator().manual_seed(seed))
        self.noise = noise

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, indices: list[int]) -> Tensor:
        rows = self.ids[indices]
        if self.noise:
            rows[0, 0] = int(torch.randint(VOCABULARY, ()))
        return rows


def _same(batch: Any) -> Any:
    return batch


class ToyData(pl.LightningDataModule):
    """The state is one integer."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy, self.consumed = toy, 0

    def train_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        assert isinstance(self.trainer.lightning_module, ToyModule)
        self.trainer.lightning_module.signal_here("start")
        positions = Positions(self.toy, self.consumed)
        return DataLoader(Rows(TRAIN, 0, noise=not self.toy.plain), batch_sampler=positions, collate_fn=_same)

    def val_dataloader(self) -> list[DataLoader[Tensor]]:
        mine = list(range(self.toy.rank, VALIDATION, self.toy.world))
        batches = [mine[start : start + 4] for start in range(0, len(mine), 4)]
        return [
            DataLoader(Rows(VALIDATION, seed, noise=False), batch_sampler=batches, collate_fn=_same)
            for seed, _ in enumerate(self.toy.validations, start=1)
        ]

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"consumed": self.trainer.global_step * self.toy.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consumed = state_dict["consumed"]


class ToyModule(pl.LightningModule):
    """Next-token prediction with dropout; classes by target id."""

    modalities = MODALITIES

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy = toy
        torch.manual_seed(3)
        self.rows = nn.Embedding(VOCABULARY, 8)
        self.dropout = nn.Dropout(0.0 if toy.plain else 0.1)
        self.head = nn.Linear(8, VOCABULARY)
        self.drawn = 0.0

    def configure_model(self) -> None:
        if self.toy.strategy == "fsdp2" and not isinstance(self.rows, FSDPModule):
            mesh = init_device_mesh("cpu", (self.toy.world,))
            for module in (self.rows, self.head):
                fully_shard(module, mesh=mesh)

    def training_step(self, ids_BT: Tensor, batch_idx: int) -> dict[str, Any]:
        nll_BT, output = self._sums(ids_BT)
        if not self.toy.plain:
            self.drawn = random.random() + float(np.random.rand())
        loss = nll_BT.mean() * (1 + 0.01 * self.drawn)
        step = self.trainer.global_step
        if step in self.toy.harm.get("nan_at", []) and self.toy.rank == self.toy.harm.get("on_rank", 0):
            loss = loss * float("nan")
        if step in self.toy.harm.get("spike_at", []) and self.toy.rank == self.toy.harm.get("on_rank", 0):
            loss = loss * 1e3
        if step == self.toy.harm.get("raise_at"):
            raise ArithmeticError("harm")
        self.signal_here("step")
        return {"loss": loss, **output}

    def validation_step(self, ids_BT: Tensor, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        if batch_idx == 1 and dataloader_idx == self.toy.harm.get("loader", 0):
            self.signal_here("validation")
        return self._sums(ids_BT)[1]

    def _sums(self, ids_BT: Tensor) -> tuple[Tensor, dict[str, Any]]:
        target_BT = ids_BT[:, 1:]
        logits_BTV = self.head(self.dropout(self.rows(ids_BT[:, :-1])))
        nll_BT = nn.functional.cross_entropy(logits_BTV.mT, target_BT, reduction="none")
        # The last id stands for a boundary, so that some micro-batches have none.
        class_BT = torch.where(target_BT == VOCABULARY - 1, 2, (target_BT >= VOCABULARY // 2).long())
        nll_sum_M = torch.zeros(3, dtype=torch.float64).index_add_(
            0, class_BT.flatten(), nll_BT.detach().double().flatten()
        )
        return nll_BT, {
            "nll_sum": nll_sum_M,
            "count": torch.bincount(class_BT.flatten(), minlength=3),
            "samples": len(ids_BT),
            "tokens_nominal": ids_BT.numel(),
            "tokens_real": (ids_BT != 0).sum(),
        }

    def signal_here(self, where: str) -> None:
        """Sends this process the signal of `harm`, if it is due here."""
        harm, step = self.toy.harm, self.trainer.global_step
        self.toy.sleep_here(where, step)
        if harm.get("signal_in") == where and step == harm["at_step"] and self.toy.rank in harm.get("ranks", [0]):
            deadline = time.monotonic() + 20
            while "slow_write" in harm and not list(self.toy.folder.rglob("*.tmp")) and time.monotonic() < deadline:
                time.sleep(0.001)  # a busy machine may not have begun the write
            os.kill(os.getpid(), harm["signal"])
            if "again_after" in harm:
                time.sleep(harm["again_after"])
                os.kill(os.getpid(), harm["signal"])

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if self.trainer.global_step == self.toy.harm.get("raise_after_update_of"):
            raise ArithmeticError("harm between an update and its account")
        scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

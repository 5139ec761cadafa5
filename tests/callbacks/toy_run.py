"""A whole run of a toy model, in a process of its own that a test may kill, starve or interrupt.

`start` forks from a server that has torch and Lightning loaded, so a run begins within a fraction of a second.
The toy draws from every global random stream: in its step, in its dropout and in its dataset.
"""

import json
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from callbacks import (
    DurableCheckpointIO,
    EMASplitPerplexity,
    EventLog,
    MetricsFile,
    NonFiniteGuard,
    Preempted,
    Preemption,
    RngState,
    RunCheckpoints,
    RunProgress,
    Throughput,
    find_resumable,
)
from callbacks.checkpoint_io import _HashingFile
from callbacks.checkpoints import step_of

MODALITIES = ("text", "image", "boundary")
VOCABULARY, LENGTH, TRAIN, VALIDATION = 12, 9, 50, 21
METRICS, EVENTS, CHECKPOINTS, OUTPUT = "metrics.jsonl", "events.log", "checkpoints", "output.txt"
# Fields that tell when, not what.
CLOCKS = ("time", "throughput")

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch", "lightning.pytorch", "callbacks"])


@dataclass
class Toy:
    """A run, and what happens to it."""

    folder: Path
    steps: int = 24
    batch_size: int = 8  # global
    accumulate: int = 2
    save_every: int = 5
    val_every: int = 6
    interval: int = 4
    rank: int = 0
    world: int = 1
    port: int = 0
    plain: bool = False  # draws nothing, so that runs on different numbers of ranks can be compared
    harm: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """What this rank's process printed."""
        return self.folder / (OUTPUT if self.rank == 0 else f"{OUTPUT}.{self.rank}")


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
        positions = Positions(self.toy, self.consumed)
        return DataLoader(Rows(TRAIN, 0, noise=not self.toy.plain), batch_sampler=positions, collate_fn=_same)

    def val_dataloader(self) -> DataLoader[Tensor]:
        mine = list(range(self.toy.rank, VALIDATION, self.toy.world))
        batches = [mine[start : start + 4] for start in range(0, len(mine), 4)]
        return DataLoader(Rows(VALIDATION, 1, noise=False), batch_sampler=batches, collate_fn=_same)

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

    def training_step(self, ids_BT: Tensor, batch_idx: int) -> dict[str, Any]:
        nll_BT, output = self._sums(ids_BT)
        if not self.toy.plain:
            self.drawn = random.random() + float(np.random.rand())
        loss = nll_BT.mean() * (1 + 0.01 * self.drawn)
        step = self.trainer.global_step
        if step in self.toy.harm.get("nan_at", []) and self.toy.rank == self.toy.harm.get("on_rank", 0):
            loss = loss * float("nan")
        if step == self.toy.harm.get("raise_at"):
            raise ArithmeticError("harm")
        self._signal_here(step, "step")
        return {"loss": loss, **output}

    def validation_step(self, ids_BT: Tensor, batch_idx: int) -> dict[str, Any]:
        if batch_idx == 1:
            self._signal_here(self.trainer.global_step, "validation")
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

    def _signal_here(self, step: int, where: str) -> None:
        harm = self.toy.harm
        if harm.get("signal_in") == where and step == harm["at_step"] and self.toy.rank in harm.get("ranks", [0]):
            os.kill(os.getpid(), harm["signal"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Witness(Callback):
    """Writes a line each step: loss, what was drawn, and the bits of the parameters."""

    def __init__(self, file: MetricsFile) -> None:
        self.file, self.step = file, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step or not trainer.is_global_zero:
            return
        self.step = trainer.global_step
        assert isinstance(pl_module, ToyModule)
        loss = float(outputs["loss"])
        witness = {
            "loss": loss if math.isfinite(loss) else None,
            "drawn": pl_module.drawn,
            "parameters": fingerprint(pl_module),
        }
        self.file.append({"step": self.step, "lr": trainer.optimizers[0].param_groups[0]["lr"], "witness": witness})


def fingerprint(module: nn.Module) -> str:
    """The bits of all parameters, as hexadecimal digits of their sum of squares, and of their sum."""
    flat = torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])
    return f"{float(flat.square().sum()).hex()} {float(flat.sum()).hex()}"


def build(toy: Toy) -> tuple[pl.Trainer, ToyModule, ToyData]:
    """Wired as a real run is."""
    events = EventLog(toy.folder / EVENTS)
    throughput = Throughput()
    meter = EMASplitPerplexity(toy.interval, 0.9, toy.folder / METRICS, extras=[throughput])
    assert meter.file is not None
    saver = RunCheckpoints(toy.folder / CHECKPOINTS, toy.save_every, metrics=meter.file, events=events)
    trainer = pl.Trainer(
        max_steps=toy.steps,
        accelerator="cpu",
        devices=toy.world,
        strategy="ddp" if toy.world > 1 else "auto",
        accumulate_grad_batches=toy.accumulate,
        gradient_clip_val=1.0,
        val_check_interval=toy.val_every * toy.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            throughput,
            Preemption(saver),
            NonFiniteGuard(limit=3, events=events),
            meter,
            Witness(meter.file),
            RunProgress(meter, toy.interval),
            RngState(5, events),
            saver,
        ],
        plugins=[DurableCheckpointIO()],
    )
    return trainer, ToyModule(toy), ToyData(toy)


def run(toy: Toy) -> int:
    """Trains from the newest whole checkpoint, if any; the exit code."""
    torch.set_num_threads(1)
    random.seed(1)
    np.random.seed(1)
    trainer, module, data = build(toy)
    checkpoint = find_resumable(toy.folder / CHECKPOINTS, EventLog(toy.folder / EVENTS) if toy.rank == 0 else None)
    if toy.rank == 0:
        MetricsFile(toy.folder / METRICS).cut_after(step_of(checkpoint) if checkpoint else -1)
    if checkpoint is None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
    inflict(toy, trainer)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except Preempted as order:
        print(order, flush=True)
        return order.exit_code
    return 0


def inflict(toy: Toy, trainer: pl.Trainer) -> None:
    """Arranges the harm of a run."""
    harm = toy.harm
    if "kill_after" in harm:
        threading.Timer(harm["kill_after"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    if "file_size" in harm:
        resource.setrlimit(resource.RLIMIT_FSIZE, (harm["file_size"], harm["file_size"]))
    if "at_operation" in harm or "count_operations" in harm:
        _watch_saves(toy, harm.get("at_operation", 0), harm.get("then", "kill"))


def _watch_saves(toy: Toy, at: int, then: str) -> None:
    """Kills, or fails with a full disk, at the given file operation of the saves, counted over the whole run."""
    count = 0

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if "count_operations" in toy.harm:
                (toy.folder / "operations").write_text(str(count))
            if count == at and then == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if count == at and then == "full":
                raise OSError(28, "No space left on device")
            return operation(*arguments, **options)

        return wrapper

    class WatchedFile(_HashingFile):
        def __init__(self, file: Any) -> None:
            super().__init__(file)
            self.file = Watched(file)  # type: ignore[assignment]

    class Watched:
        def __init__(self, file: Any) -> None:
            self.write = watched(file.write)

    import callbacks.checkpoint_io

    callbacks.checkpoint_io._HashingFile = WatchedFile  # type: ignore[misc]
    os.fsync = watched(os.fsync)
    os.replace = watched(os.replace)


def _process(toy: Toy) -> None:
    output = os.open(toy.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    if toy.world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(toy.port), "LOCAL_RANK": str(toy.rank)}
        os.environ |= {"WORLD_SIZE": str(toy.world), "NODE_RANK": "0"}
    code = run(toy)
    sys.stdout.flush()
    os._exit(code)  # a timer that has not fired must not keep the process


def start(toy: Toy) -> BaseProcess:
    """Begins a run."""
    toy.folder.mkdir(parents=True, exist_ok=True)
    process = server.Process(target=_process, args=(toy,), daemon=True)
    process.start()
    return process


def finish(*processes: BaseProcess, timeout: float = 60) -> list[int | None]:
    """Waits for runs; their exit codes, negative for a signal."""
    for process in processes:
        process.join(timeout)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, f"{len(hung)} of {len(processes)} processes hung"
    return [process.exitcode for process in processes]


def run_to_end(toy: Toy) -> int | None:
    """A run alone."""
    return finish(start(toy))[0]


def free_port() -> int:
    """A port for the ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, but for the clocks."""
    records = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]

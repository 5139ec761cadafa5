"""A whole run of a toy model, in a process of its own that a test may kill, starve or interrupt.

`start` forks from a server that has torch and Lightning loaded, so a run begins within a fraction of a second.
"""

import hashlib
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
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.distributed.tensor import DTensor

from callbacks import (
    BatchReading,
    DurableCheckpointIO,
    EMASplitPerplexity,
    EventLog,
    MetricsFile,
    NonFiniteGuard,
    Preempted,
    Preemption,
    RankProgress,
    RngState,
    RunCheckpoints,
    RunProgress,
    Throughput,
    find_resumable,
)
from callbacks.checkpoints import step_of
from callbacks.files.checkpoint_io import _HashingFile
from t2i_lm.runtime.command_line import exit_code
from t2i_lm.runtime.rank_beats import Limits
from t2i_lm.runtime.rank_watch import RankWatch
from t2i_lm.training.jobs import PRELOAD
from t2i_lm.training.ranks import WatchedDDP, prepare_last_words
from tests.callbacks.toy_model import Positions, Toy, ToyData, ToyModule

METRICS, EVENTS, CHECKPOINTS = "metrics.jsonl", "events.log", "checkpoints"
# Fields that a clock measured, or that cover such a field.
CLOCKS = ("time", "throughput", "digest")

# A process has one server: that of t2i_lm.training.jobs, too.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload([*PRELOAD, "callbacks", "t2i_lm.training.run", "tests.preload"])


class Witness(Callback):
    """Writes a line each step: loss, random numbers, and the bits of the parameters."""

    def __init__(self, file: MetricsFile, preemption: Preemption) -> None:
        self.file, self.preemption, self.step = file, preemption, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Long work after a validation, that can be stopped."""
        assert isinstance(pl_module, ToyModule)
        pl_module.signal_here("work after validation")
        self.preemption.stop_if_asked(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        assert isinstance(pl_module, ToyModule)
        parameters = fingerprint(pl_module)
        if not trainer.is_global_zero:
            return
        loss = float(outputs["loss"])
        witness = {
            "loss": loss if math.isfinite(loss) else None,
            "drawn": pl_module.drawn,
            "parameters": parameters,
        }
        self.file.append({"step": self.step, "lr": trainer.optimizers[0].param_groups[0]["lr"], "witness": witness})


def fingerprint(module: nn.Module) -> str:
    """sha256 of the bits of all parameters."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        digest.update(whole.detach().numpy().tobytes())
    return digest.hexdigest()


def strategy(toy: Toy) -> Strategy | str:
    """The strategy of a run."""
    if toy.strategy == "fsdp2":
        from t2i_lm.training.sharded_strategy import ShardedStrategy

        return ShardedStrategy()
    return "ddp" if toy.world > 1 else "auto"


def build(toy: Toy, watch: RankWatch | None = None) -> tuple[pl.Trainer, ToyModule, ToyData]:
    """Wired as a real run is."""
    events = EventLog(toy.folder / EVENTS)
    throughput = Throughput()
    meter = EMASplitPerplexity(toy.interval, 0.9, toy.folder / METRICS, [throughput], toy.validations)
    assert meter.file is not None
    saver = RunCheckpoints(
        toy.folder / CHECKPOINTS,
        toy.save_every,
        metrics=meter.file,
        events=events,
        background=toy.background,
        keep_steps=toy.keep_steps,
    )
    preemption = Preemption(saver)
    trainer = pl.Trainer(
        max_steps=toy.steps,
        accelerator="cpu",
        devices=toy.world,
        strategy=WatchedDDP(watch) if watch else strategy(toy),
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
            *([RankProgress(watch)] if watch else []),
            throughput,
            preemption,
            NonFiniteGuard(3, events=events, skip_above=10.0, samples=partial(samples_after, toy), warmup=4),
            meter,
            Witness(meter.file, preemption),
            RunProgress(meter, toy.interval),
            RngState(5, events),
            *([BatchReading(watch)] if watch else []),
            saver,
        ],
        plugins=[DurableCheckpointIO()],
    )
    if watch:
        prepare_last_words(watch, toy.folder, events, trainer.callbacks, None)  # type: ignore[attr-defined]
    return trainer, ToyModule(toy), ToyData(toy)


def samples_after(toy: Toy, step: int) -> list[str]:
    """Names of the samples of a step's global batch."""
    return [f"row{Positions._index(step * toy.batch_size + place)}" for place in range(toy.batch_size)]


def watch_over(toy: Toy) -> RankWatch | None:
    """The watch of a run with `rank_s`, which begins before anything is built."""
    if not toy.rank_s:
        return None
    watch = RankWatch(toy.rank, toy.world, Limits(toy.rank_s, toy.harm.get("phase_s", 60.0)))
    watch.open("127.0.0.1", toy.port)
    return watch


def run(toy: Toy) -> int:
    """Trains from the newest whole checkpoint, if any; the exit code."""
    with watch_over(toy) or nullcontext() as watch:
        return fit(toy, watch)


def fit(toy: Toy, watch: RankWatch | None) -> int:
    """Builds and trains."""
    torch.set_num_threads(1)
    random.seed(1)
    np.random.seed(1)
    time.sleep(toy.harm.get("building_s", 0) if toy.rank == 0 else 0)
    if toy.harm.get("refused_by") == toy.rank:
        raise ValueError("the config differs")
    trainer, module, data = build(toy, watch)
    events = EventLog(toy.folder / EVENTS)
    checkpoint = find_resumable(toy.folder / CHECKPOINTS, events.write if toy.rank == 0 else None)
    if toy.rank == 0:
        MetricsFile(toy.folder / METRICS).cut_after(step_of(checkpoint) if checkpoint else -1)
    if checkpoint is None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
    if "resume_folder" in toy.harm and toy.rank > 0:
        checkpoint = toy.folder / CHECKPOINTS  # rank 0 names the file
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
    if "signal_in_save_of" in harm:
        _signal_in_save(harm["signal_in_save_of"])
    if "file_size" in harm:
        resource.setrlimit(resource.RLIMIT_FSIZE, (harm["file_size"], harm["file_size"]))
    if harm.keys() & {"at_operation", "count_operations", "slow_write"}:
        _watch_saves(toy, harm.get("at_operation", 0), harm.get("then", "kill"))


def _signal_in_save(step: int) -> None:
    """Sends SIGTERM to this process while it saves a step."""
    save = DurableCheckpointIO.save_checkpoint

    def signalled(self: DurableCheckpointIO, checkpoint: dict[str, Any], *rest: Any, **options: Any) -> None:
        if checkpoint["global_step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, checkpoint, *rest, **options)

    DurableCheckpointIO.save_checkpoint = signalled  # type: ignore[method-assign]


def _watch_saves(toy: Toy, at: int, then: str) -> None:
    """Kills, or fails with a full disk, at the given file operation of the saves, counted over the whole run."""
    delay = toy.harm.get("slow_write", 0.0)  # seconds of each operation
    count, lock = 0, threading.Lock()  # a save in the background is another thread

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                now = count
                if "count_operations" in toy.harm:
                    (toy.folder / "operations").write_text(str(count))
            time.sleep(delay)
            if now == at and then == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if now == at and then == "full":
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

    import callbacks.files.checkpoint_io

    callbacks.files.checkpoint_io._HashingFile = WatchedFile  # type: ignore[misc]
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
    code = exit_code(lambda: run(toy)) if toy.rank_s else run(toy)
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

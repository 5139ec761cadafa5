"""The ranks of a run: where they meet, the watch over them, and strategies whose collectives do not outlast it."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import nn
from torch.distributed.tensor import DTensor

from callbacks import EventLog, RunCheckpoints
from t2i_lm.config.sections import TrainerConfig
from t2i_lm.runtime import progress
from t2i_lm.runtime.rank_beats import Limits
from t2i_lm.runtime.rank_watch import RankWatch
from t2i_lm.runtime.slurm import requeue
from t2i_lm.storage.owner import Ownership
from t2i_lm.training.sharded_strategy import ShardedStrategy


def cluster(processes: int) -> ClusterEnvironment:
    """Who launched this process, in Lightning's order: torchrun, Slurm's `srun`, others, or Lightning or a person.

    Nobody of a run of one process, also in a job of several tasks, for which Lightning refuses a run without `srun`.
    """
    if processes == 1:
        return LightningEnvironment()
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        # Without Lightning's signal handler, which saves inside the handler and trains on.
        return SLURMEnvironment(auto_requeue=False)
    return next((kind() for kind in (LSFEnvironment, MPIEnvironment) if kind.detect()), LightningEnvironment())


def watch_ranks(trainer: TrainerConfig) -> RankWatch | None:
    """The watch of this process over the ranks of a run, before anything is built; None for a run of one process.

    Of a process that has yet to launch the others, it begins when they are launched (`WatchedRanks`).
    """
    world = trainer.processes
    environment = cluster(world)
    if world == 1 or (isinstance(environment, SLURMEnvironment) and "SLURM_PROCID" not in os.environ):
        return None
    if isinstance(environment, LightningEnvironment):
        rank = environment.node_rank() * trainer.devices + environment.local_rank()
    else:
        rank = environment.global_rank()
    watch = RankWatch(rank, world, Limits(trainer.rank_timeout, trainer.phase_timeout))
    progress.listeners[:] = [watch.moved]
    if trainer.compile:
        _note_compilations(watch)
    if environment.creates_processes_externally:
        watch.open(environment.main_address, environment.main_port)
    return watch


def _note_compilations(watch: RankWatch) -> None:
    from torch._dynamo.callback import callback_handler

    callback_handler.register_start_callback(lambda _: watch.compiling(True))
    callback_handler.register_end_callback(lambda _: watch.compiling(False))


def prepare_last_words(
    watch: RankWatch, run: Path | str, events: EventLog, callbacks: Sequence[Any], owner: Ownership | None
) -> None:
    """What a rank does and says when another ends the run: an event, the job's place in the queue, how to go on.

    Args:
        watch: of this rank.
        run: value of `--resume` with which the run continues.
        events: the run's log, written by rank 0.
        callbacks: of the run, one of which knows the newest checkpoint.
        owner: of the run folder, on the rank that holds it.
    """
    saver = next(callback for callback in callbacks if isinstance(callback, RunCheckpoints))

    def advice() -> str:
        step = saver.saved_step
        if not step:
            return "No checkpoint was saved yet: start the run again"
        return f"The newest checkpoint is that of step {step}; continue with --resume {run}"

    def last_words(text: str) -> None:
        if watch.rank == 0:
            events.write("rank-lost", text)
        if owner is not None:
            owner.release()
        if watch.rank == 0 and watch.signalled == signal.SIGUSR1 and (line := requeue()):
            print(line, file=sys.stderr, flush=True)

    watch.advice, watch.last_words = advice, last_words


class WatchedRanks:
    """A strategy's part that begins the watch where it launches ranks, and bounds its collectives.

    Their time-out only matters if the watch fails: it is longer than all that the watch allows.
    """

    _timeout: timedelta | None
    _launcher: Any
    cluster_environment: ClusterEnvironment | None
    num_processes: int
    num_nodes: int

    def __init__(self, watch: RankWatch, **options: Any) -> None:
        super().__init__(**options)
        self.watch = watch
        self._timeout = collective_timeout(watch.limits)

    def _configure_launcher(self) -> None:
        super()._configure_launcher()  # type: ignore[misc]
        if isinstance(self._launcher, _SubprocessScriptLauncher):
            assert self.cluster_environment is not None
            self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes, self.watch)

    def setup_environment(self) -> None:
        self.watch.enter("meeting")
        super().setup_environment()  # type: ignore[misc]
        self.watch.enter("starting")


def collective_timeout(limits: Limits) -> timedelta:
    """Time-out of a collective, in which ranks may wait for the longest phase of another."""
    return timedelta(seconds=limits.phase_s + 2 * limits.rank_s + 60)


class WatchedDDP(WatchedRanks, DDPStrategy):
    """DDP with a watch over its ranks."""


class WatchedShards(WatchedRanks, ShardedStrategy):
    """FSDP2 with a watch over its ranks."""

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        assert self.model is not None
        assert self._timeout is not None
        bound_collectives(self.model, self._timeout)


def bound_collectives(model: nn.Module, timeout: timedelta) -> None:
    """Gives the process groups of sharded parameters a `timeout`: those of a mesh have torch's, 10 min for NCCL."""
    # Public in later versions of torch.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    for group in {group for mesh in meshes for group in mesh.get_all_groups()}:
        set_timeout(timeout, group)


class _Launcher(_SubprocessScriptLauncher):
    """Launches the other ranks of this machine, and begins the watch over them.

    It takes the place of Lightning's observer, which kills this process without a word when another rank ends.
    """

    def __init__(self, environment: ClusterEnvironment, processes: int, nodes: int, watch: RankWatch) -> None:
        super().__init__(environment, processes, nodes)
        self.watch = watch
        self.children: list[subprocess.Popen[bytes]] = []

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        self.children, self.procs = self.procs, []  # the observer watches `procs`
        environment = self.cluster_environment
        children = {self.watch.rank + number: process for number, process in enumerate(self.children, start=1)}
        self.watch.open(environment.main_address, environment.main_port, children)

    def kill(self, signum: Any) -> None:
        for process in self.children:
            process.send_signal(signum)

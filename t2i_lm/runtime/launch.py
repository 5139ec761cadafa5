"""Ranks of this process, by what its launcher says in the environment. Imports no torch."""

import os
from collections.abc import Mapping

from t2i_lm.config.sections import TrainerConfig

# Numbers that are not 0 in all but the first process, of Lightning's launcher and of those that set no RANK.
OTHERS = ("NODE_RANK", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK")


def is_first_process(processes: int) -> bool:
    """Whether this process is the first of a run's; before Lightning launches others, also whether it will be.

    Args:
        processes: of the run. One alone is the first, even as one of several runs that `mpirun` started.
    """
    others = OTHERS if processes > 1 else ()
    return global_rank() == 0 and not any(int(os.environ.get(name, "0")) for name in others)


def local_rank() -> int:
    """Rank of this process on its machine, also the index of its GPU."""
    return _number("LOCAL_RANK", "SLURM_LOCALID", 0)


def global_rank() -> int:
    """Rank of this process among all."""
    return _number("RANK", "SLURM_PROCID", 0)


def world_size() -> int:
    """Number of processes."""
    return _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)


def require_launched(trainer: TrainerConfig) -> None:
    """Checks that a run has the processes that were started for it: with fewer, each one would train it anew.

    Not counted are tasks of `srun` where this process has a terminal, as in a shell of `srun --pty`. A launcher other
    than torchrun and `srun` may start one process of a machine, which launches the others.

    Raises:
        ValueError: naming the keys and both numbers.
    """
    if "RANK" in os.environ:
        complete, started = "TORCHELASTIC_RUN_ID" in os.environ, int(os.environ.get("WORLD_SIZE", "1"))
        launcher = "torchrun" if complete else "the launcher"
    else:
        launcher, complete, started = "srun", True, int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if started == 1 or os.isatty(0):
            return
    if started > trainer.processes or (complete and started < trainer.processes):
        raise ValueError(
            f"trainer.devices={trainer.devices} trainer.num_nodes={trainer.num_nodes}: expected a product of "
            f"{started}, the number of processes that {launcher} started, not {trainer.processes}; set them to the "
            f"processes of a machine and the number of machines, or start {trainer.processes}"
        )


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process alone: without what tells it that it is one of several."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *OTHERS)
    return {
        name: value for name, value in environment.items() if name not in ranks and not name.startswith("SLURM_STEP_")
    }


def _number(torchrun: str, srun: str, alone: int) -> int:
    """A number set by the launcher: torchrun or Lightning, else Slurm's `srun` of several tasks."""
    under_srun = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return int(os.environ.get(torchrun, os.environ[srun] if under_srun else alone))

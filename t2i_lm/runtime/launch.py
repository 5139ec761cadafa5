"""Ranks of this process, by what its launcher says in the environment. Imports no torch."""

import os
from collections.abc import Mapping

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

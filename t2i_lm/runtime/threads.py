"""CPU threads of a process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path

import torch

from callbacks.files.cgroups import groups, words
from t2i_lm.config.sections import TrainerConfig

# OpenMP's variable, of which torch and Lightning take their default. Launched processes inherit it.
VARIABLE = "OMP_NUM_THREADS"
CHOSEN = VARIABLE in os.environ  # by the user or a launcher, before any run here
TORCHS = torch.get_num_threads()


def default_threads() -> int:
    """OMP_NUM_THREADS, else the cores within the CPU quota of this process's container.

    Torch counts all cores of the machine. Threads beyond the quota wait for each other.
    """
    return TORCHS if CHOSEN else min([TORCHS, *map(ceil, processor_quotas())])


def threads_of(trainer: TrainerConfig) -> int:
    """Threads of each process of a run: `trainer.threads`, else its share of `default_threads` on this machine."""
    if trainer.threads is not None:
        return trainer.threads
    if CHOSEN:
        return default_threads()
    if "SLURM_CPUS_PER_TASK" in os.environ:  # a task's own cores, which need not be divided
        return max(1, min(default_threads(), int(os.environ["SLURM_CPUS_PER_TASK"])))
    return max(1, default_threads() // trainer.devices)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Sets the threads of this process and of those that it launches.

    By the variable too: without it, Lightning sets the number of cores.
    """
    before, threads = os.environ.get(VARIABLE), torch.get_num_threads()
    torch.set_num_threads(count)
    os.environ[VARIABLE] = str(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def processor_quotas(root: Path = Path("/")) -> Iterator[float]:
    """Cores that each quota gives this process, of its own control group and of those above."""
    for folder, is_v2 in groups(root, "cpu"):
        found = words(folder, *(("cpu.max",) if is_v2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")))
        if found is not None and found[0] not in ("max", "-1"):
            yield int(found[0]) / int(found[1])

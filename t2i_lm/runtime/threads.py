"""CPU threads of a process."""

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import torch

from callbacks.files.cgroups import groups, words

CHOSEN = "OMP_NUM_THREADS"  # variable that decides torch's default, also of processes that are started here


def use_threads(threads: int | None, processes: int = 1) -> None:
    """Sets the threads of this process: `trainer.threads`, or its share of `default_threads`.

    Args:
        threads: `trainer.threads`.
        processes: that share this machine, of which Lightning starts the others with as many.
    """
    alone = processes == 1 or CHOSEN in os.environ
    count = threads or (default_threads() if alone else max(1, default_threads() // processes))
    torch.set_num_threads(count)
    if processes > 1:
        os.environ[CHOSEN] = str(count)  # else Lightning sets both by the number of cores


def default_threads() -> int:
    """Torch's default, OMP_NUM_THREADS or the number of cores, but no more than a container's quota keeps busy.

    Threads beyond the quota would wait for each other: torch counts all cores of the machine.
    """
    count = torch.get_num_threads()
    return count if CHOSEN in os.environ else min([count, *map(ceil, processor_quotas())])


def processor_quotas(root: Path = Path("/")) -> Iterator[float]:
    """Cores that each quota gives this process, of its own control group and of those above."""
    for folder, is_v2 in groups(root, "cpu"):
        found = words(folder, *(("cpu.max",) if is_v2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")))
        if found is not None and found[0] not in ("max", "-1"):
            yield int(found[0]) / int(found[1])

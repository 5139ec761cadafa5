"""What Slurm's `srun` gives its tasks, and a stand-in for it: `python -m tests.slurm COMMAND` starts SLURM_NTASKS."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence


def task_environment(rank: int, port: int, tasks: int = 2) -> dict[str, str]:
    """Environment of a task of one node, as far as it is read here."""
    return {
        "SLURM_JOB_ID": os.environ.get("SLURM_JOB_ID", "4711"),
        "SLURM_JOB_NAME": "t2i",
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "MASTER_PORT": str(port),
    }


def main(command: Sequence[str]) -> int:
    """Starts the tasks, passes SIGTERM and SIGUSR1 on to all, and returns the largest exit code, as srun does."""
    count = int(os.environ["SLURM_NTASKS"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    tasks = [subprocess.Popen(command, env=os.environ | task_environment(rank, port, count)) for rank in range(count)]

    def pass_on(number: int, _: object) -> None:
        for task in tasks:
            task.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

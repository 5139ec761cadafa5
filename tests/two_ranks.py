"""Runs on two ranks in torchrun's environment, forked from a server that has torch and Lightning loaded."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from t2i_lm.storage.run_folder import Run, read_run, run_folders
from t2i_lm.train import main
from tests.callbacks.toy_run import finish, free_port, server


def environments() -> list[dict[str, str]]:
    """Those in which torchrun's two ranks meet."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "tests"}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def train_on_two_ranks(
    experiment: str, root: Path, *overrides: str, around: Callable[[Callable[[], int]], int] | None = None
) -> Run:
    """Trains with one process per rank, which both must succeed.

    Args:
        experiment: YAML file.
        root: folder of runs.
        overrides: options of `t2i_lm.train`; `trainer.strategy=ddp` is among them or another one.
        around: is called in each process with what trains, and returns the exit code.
    """
    root.mkdir(parents=True, exist_ok=True)
    arguments = [experiment, *overrides, "trainer.devices=2"]
    if "--resume" not in overrides:
        arguments.append(f"run.dir={root}")
    logs = [root / f"rank-{rank}.log" for rank in range(2)]
    processes = [
        server.Process(target=_train, args=(arguments, environment, log, around))
        for environment, log in zip(environments(), logs, strict=True)
    ]
    for process in processes:
        process.start()
    codes = finish(*processes, timeout=500)
    assert codes == [0, 0], "".join(log.read_text() for log in logs)
    return read_run(run_folders(root)[-1])


def _train(
    arguments: list[str], environment: dict[str, str], log: Path, around: Callable[[Callable[[], int]], int] | None
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environment
    torch.set_num_threads(1)
    code = main(arguments) if around is None else around(lambda: main(arguments))
    sys.stdout.flush()
    os._exit(code)

"""Runs on two ranks in torchrun's environment, forked from a server that has torch and Lightning loaded."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from t2i_lm.storage.run_folder import Run, read_run, run_folders
from t2i_lm.train import main
from t2i_lm.training.run import FOLDER_VARIABLE
from tests.callbacks.toy_run import finish, free_port, server
from tests.runs import write_into


def environments(nodes: int = 1) -> list[dict[str, str]]:
    """Those in which torchrun's two ranks meet, on one node or one on each of two."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "tests"}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(2 // nodes)}
    places = [("0", str(rank)) if nodes == 1 else (str(rank), "0") for rank in range(2)]
    return [
        {**common, "RANK": str(rank), "GROUP_RANK": node, "LOCAL_RANK": local}
        for rank, (node, local) in enumerate(places)
    ]


def train_on_two_ranks(
    experiment: str,
    root: Path,
    *overrides: str,
    around: Callable[[Callable[[], int]], int] | None = None,
    command: Callable[[list[str]], int] = main,
    nodes: int = 1,
) -> Run:
    """Trains with one process per rank, which both must succeed.

    Args:
        experiment: YAML file.
        root: folder of runs.
        overrides: options of `t2i_lm.train`; `trainer.strategy=ddp` is among them or another one.
        around: is called in each process with what trains, and returns the exit code.
        command: of the experiment and overrides.
        nodes: 1 or 2, on which the ranks are.
    """
    root.mkdir(parents=True, exist_ok=True)
    arguments = [experiment, *overrides, f"trainer.devices={2 // nodes}", f"trainer.num_nodes={nodes}"]
    if "--resume" not in overrides:
        arguments.append(f"run.dir={root}")
    logs = [root / f"rank-{rank}.log" for rank in range(2)]
    processes = [
        server.Process(target=_train, args=(arguments, environment, log, command, around))
        for environment, log in zip(environments(nodes), logs, strict=True)
    ]
    for process in processes:
        process.start()
    codes = finish(*processes, timeout=500)
    assert codes == [0, 0], "".join(log.read_text() for log in logs)
    return read_run(run_folders(root)[-1])


def _train(
    arguments: list[str],
    environment: dict[str, str],
    log: Path,
    command: Callable[[list[str]], int],
    around: Callable[[Callable[[], int]], int] | None,
) -> None:
    write_into(log, environment)
    code = command(arguments) if around is None else around(lambda: command(arguments))
    assert FOLDER_VARIABLE not in os.environ, "the next run of this process would take the folder for its own"
    sys.stdout.flush()
    os._exit(code)

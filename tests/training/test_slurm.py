"""Two processes under the environment that Slurm's `srun` gives them, without torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from t2i_lm.runtime.devices import global_rank, local_rank, world_size
from t2i_lm.storage.run_folder import read_run, run_folders
from t2i_lm.train import main
from tests.callbacks.toy_run import free_port

ROOT = Path(__file__).parents[2]
PRETRAINED = str(ROOT / "experiments" / "t2i_pretrained.yaml")


def srun(rank: int, port: int) -> dict[str, str]:
    """What task `rank` of two on one node finds in its environment, as far as anything here reads it."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "t2i",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "MASTER_PORT": str(port),
    }


def test_two_tasks_train_one_run(tiny: list[str], tmp_path: Path) -> None:
    common = [PRETRAINED, *tiny, "samples.prompts=0", f"data.cache_dir={tmp_path}/cache"]
    assert main([*common, f"run.dir={tmp_path}/one"]) == 0
    port = free_port()
    command = [sys.executable, "-m", "t2i_lm.train", *common, f"run.dir={tmp_path}/two"]
    tasks = [
        subprocess.Popen(
            [*command, "trainer.strategy=ddp", "trainer.devices=2"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | srun(rank, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for task in tasks:
        output, _ = task.communicate(timeout=300)
        assert task.returncode == 0, output
    (two,) = run_folders(tmp_path / "two")
    (one,) = run_folders(tmp_path / "one")
    losses = [[record["val"]["all"]["nll"] for record in read_run(run).records("val")] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_launcher_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (global_rank(), local_rank(), world_size()) == (0, 0, 1)
    for key, value in srun(1, 0).items():
        monkeypatch.setenv(key, value)
    assert (global_rank(), local_rank(), world_size()) == (1, 1, 2)
    for key, value in {"RANK": "5", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}.items():  # torchrun in a task of srun
        monkeypatch.setenv(key, value)
    assert (global_rank(), local_rank(), world_size()) == (5, 0, 8)


def test_a_batch_script_that_has_not_called_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(key, value)
    assert (global_rank(), local_rank(), world_size()) == (0, 0, 1)

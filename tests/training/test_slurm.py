"""Two processes under the environment that Slurm's `srun` gives them, without torchrun."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from t2i_lm.config.sections import TrainerConfig
from t2i_lm.runtime.launch import global_rank, local_rank, world_size
from t2i_lm.storage.run_folder import Run, read_run, run_folders
from t2i_lm.train import main
from t2i_lm.training.ranks import cluster, watch_ranks
from tests.callbacks.toy_run import free_port
from tests.runs import PRETRAINED, QUICK, ROOT, Forked, curve, launch_module, same_losses, succeed
from tests.slurm import task_environment
from tests.test_train import wait_for_lines


@pytest.mark.slow
def test_two_tasks_train_one_run(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    port = free_port()
    changes = [*tiny, *QUICK, f"run.dir={tmp_path}", "trainer.strategy=ddp", "trainer.devices=2"]
    succeed(*(Forked("t2i_lm.train", PRETRAINED, *changes, **task_environment(rank, port)) for rank in range(2)))
    (folder,) = run_folders(tmp_path)
    same_losses(read_run(folder), pretrained, 1e-6)


@pytest.mark.slow
def test_slurms_signal_saves_and_requeues_and_the_job_goes_on(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    """A job of one task, with a stand-in for `scontrol` that lists the checkpoints at its call."""
    program, called, root = tmp_path / "scontrol", tmp_path / "called", tmp_path / "runs"
    program.write_text(f'#!/bin/sh\necho "$@" >> {called}\nls {root}/*/*/checkpoints >> {called}\n')
    program.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "t2i",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    process = launch_module("t2i_lm.train", PRETRAINED, *tiny, f"run.dir={root}", **job)
    metrics = wait_for_lines(process, root, 2)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 138, output
    assert "saved. Continue with --resume" in output
    assert "job 4711 is requeued" in output
    order, *saved = called.read_text().splitlines()
    assert order == "requeue 4711"
    assert any(name.endswith(".ckpt") for name in saved)
    assert not list(ROOT.glob("hpc_ckpt*"))
    assert main([PRETRAINED, "--resume", "latest", *tiny, f"run.dir={root}"]) == 0
    assert curve(read_run(metrics.parent)) == curve(pretrained)


@pytest.mark.parametrize("saved", ["step-00000500.ckpt", "not-started", ".step-00000500.ckpt.tmp", None])
def test_the_batch_script_requeues_resumes_and_hands_over_its_finished_run(saved: str | None, tmp_path: Path) -> None:
    """With stand-ins: `srun` writes files of a run, and ends as a stopped run does, then as a finished one.

    A run that has nothing to resume, as of a machine lost before its first checkpoint, begins again.
    """
    folder = "runs/$SLURM_JOB_ID/t2i_scratch/20260301-100000-paper"
    files = " ".join(f"{folder}/{name}" for name in ("config.yaml", *([f"checkpoints/{saved}"] if saved else [])))
    programs = {
        "srun": f'mkdir -p {folder}/checkpoints; touch {files}; echo "$@" >> calls; '
        "[ -e stopped ] || { touch stopped; exit 143; }",
        "scontrol": 'echo scontrol "$@" >> calls',
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "8"}
    script = ["bash", str(ROOT / "experiments" / "slurm" / "train.sbatch"), "t2i_scratch", "paper", "seed=1"]
    codes = [subprocess.run(script, cwd=tmp_path, env=environment).returncode for _ in range(2)]
    assert codes == [143, 0]
    train = "--cpus-per-task=8 .venv/bin/python -m t2i_lm.train experiments/t2i_scratch.yaml --scale paper"
    resume = "--resume latest " if saved in ("step-00000500.ckpt", "not-started") else ""
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"{train} run.dir=runs/4711 seed=1",
        "scontrol requeue 4711",
        f"{train} {resume}run.dir=runs/4711 seed=1",
    ]
    assert [run.name for run in run_folders(tmp_path / "runs", "t2i_scratch")] == ["20260301-100000-paper"]
    assert not (tmp_path / "runs" / "4711").exists()


def test_ranks_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (global_rank(), local_rank(), world_size()) == (0, 0, 1)
    for key, value in task_environment(1, 0).items():
        monkeypatch.setenv(key, value)
    assert (global_rank(), local_rank(), world_size()) == (1, 1, 2)
    for key, value in {"RANK": "5", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}.items():  # torchrun in a task of srun
        monkeypatch.setenv(key, value)
    assert (global_rank(), local_rank(), world_size()) == (5, 0, 8)


def test_a_batch_script_that_has_not_called_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(key, value)
    assert (global_rank(), local_rank(), world_size()) == (0, 0, 1)


def test_a_run_of_one_process_needs_no_srun_in_a_job_of_several_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "batch", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(key, value)
    assert watch_ranks(TrainerConfig()) is None
    assert isinstance(cluster(1), LightningEnvironment)

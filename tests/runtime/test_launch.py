"""Ranks by what the launcher says in the environment."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_lm.ablate import main as ablate
from t2i_lm.config.sections import TrainerConfig
from t2i_lm.runtime.launch import OTHERS, is_first_process, require_launched
from t2i_lm.train import main as train
from tests.runs import EXPERIMENTS

RANKS = ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", *OTHERS)
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),  # torchrun
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"NODE_RANK": "0", "MASTER_ADDR": "a"}, True),  # Lightning's own launch, one command on each machine
        ({"NODE_RANK": "1", "MASTER_ADDR": "a"}, False),
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, False),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_RANK": "1"}, False),
        ({"OMPI_COMM_WORLD_RANK": "0"}, True),
    ],
)
def test_one_process_is_the_first(environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process(2) == first


def test_one_process_is_the_first_of_its_run_also_as_one_of_many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("NODE_RANK", "1")
    assert is_first_process(1)


@pytest.mark.parametrize(
    ("environment", "devices", "nodes", "words"),
    [
        ({}, 4, 2, None),  # Lightning launches them
        ({"NODE_RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}, 4, 2, None),  # it has
        ({"NODE_RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}, 1, 1, None),  # for an earlier run of this process
        ({**TORCHRUN, "WORLD_SIZE": "8"}, 4, 2, None),
        ({**TORCHRUN, "WORLD_SIZE": "2"}, 1, 1, "product of 2, the number of processes that torchrun started, not 1"),
        ({**TORCHRUN, "WORLD_SIZE": "2"}, 4, 2, "product of 2, the number of processes that torchrun started, not 8"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 4, 2, None),  # one process of each machine
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, 1, "product of 2, the number of processes that the launcher started"),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, 4, 2, None),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "64"}, 1, 1, "product of 64, .* that srun started, not 1"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 4, 1, None),  # a shell of one task
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "64"}, 1, 1, None),  # a batch script that has not called srun
        ({**TORCHRUN, "WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2"}, 4, 2, None),  # torchrun in each task
    ],
)
def test_a_run_has_the_processes_that_were_launched(
    environment: dict[str, str], devices: int, nodes: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "isatty", lambda handle: False)
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer = TrainerConfig(devices=devices, num_nodes=nodes)
    if words is None:
        require_launched(trainer)
        return
    with pytest.raises(
        ValueError, match=rf"^trainer\.devices={devices} trainer\.num_nodes={nodes}: expected a {words}"
    ):
        require_launched(trainer)


def test_a_terminal_of_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    ours, theirs = os.openpty()
    before = os.dup(0)
    try:
        os.dup2(theirs, 0)
        require_launched(TrainerConfig())
    finally:
        os.dup2(before, 0)
        for handle in (ours, theirs, before):
            os.close(handle)


@pytest.mark.parametrize(("command", "arguments"), [(train, []), (ablate, ["--freeze", "norm"])])
def test_commands_that_train_refuse_more_processes_than_their_runs_have(
    command: Callable[[list[str]], int],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {**TORCHRUN, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert command([*arguments, str(EXPERIMENTS / "uncond_scratch.yaml"), f"run.dir={tmp_path}"]) == 2
    assert "trainer.devices=1 trainer.num_nodes=1: expected a product of 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

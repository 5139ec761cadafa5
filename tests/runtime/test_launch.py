"""Ranks by what the launcher says in the environment."""

import pytest

from t2i_lm.runtime.launch import OTHERS, is_first_process

RANKS = ("RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", *OTHERS)


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

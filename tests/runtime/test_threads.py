"""CPU threads: those of the config, else the machine's, within the quota of a container and shared among ranks."""

import os
from pathlib import Path

import pytest
import torch

from t2i_lm.config.sections import TrainerConfig
from t2i_lm.runtime import threads
from t2i_lm.runtime.threads import VARIABLE, default_threads, processor_quotas, threads_of, use_threads


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine of eight cores on which nobody has chosen a number of threads; returns what changes it."""
    monkeypatch.setattr(threads, "TORCHS", 8)
    monkeypatch.setattr(threads, "CHOSEN", False)
    monkeypatch.setattr(threads, "processor_quotas", lambda: iter([]))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("group", "files", "quotas"),
    [
        ("0:", {"pod/task/cpu.max": "150000 100000"}, [1.5]),
        ("0:", {"pod/task/cpu.max": "max 100000", "pod/cpu.max": "200000 100000"}, [2.0]),
        ("0:", {"cpu.max": "300000 100000"}, [3.0]),  # in a container, whose group is mounted as the root
        ("0:", {"pod/task/cpu.weight": "100"}, []),
        ("4:cpu,cpuacct", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, [0.5]),
        ("4:cpu,cpuacct", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ("4:memory", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, []),
    ],
)
def test_quotas_are_those_of_the_control_groups(
    tmp_path: Path, group: str, files: dict[str, str], quotas: list[float]
) -> None:
    texts = {"proc/self/cgroup": f"{group}:/pod/task", **{f"sys/fs/cgroup/{name}": files[name] for name in files}}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert list(processor_quotas(tmp_path)) == quotas


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert not list(processor_quotas(tmp_path))


def test_threads_stay_within_a_quota_unless_they_are_chosen(cores: pytest.MonkeyPatch) -> None:
    assert default_threads() == 8
    cores.setattr(threads, "processor_quotas", lambda: iter([1.5, 3.0]))
    assert default_threads() == 2
    assert threads_of(TrainerConfig(threads=3)) == 3
    cores.setattr(threads, "CHOSEN", True)
    assert default_threads() == 8


def test_ranks_share_the_cores_of_a_machine(cores: pytest.MonkeyPatch) -> None:
    assert threads_of(TrainerConfig(devices=2)) == 4
    assert threads_of(TrainerConfig(devices=16)) == 1
    assert threads_of(TrainerConfig(devices=16, threads=3)) == 3
    cores.setenv("SLURM_CPUS_PER_TASK", "6")  # a task's own
    assert threads_of(TrainerConfig(devices=2)) == 6
    cores.setattr(threads, "CHOSEN", True)
    assert threads_of(TrainerConfig(devices=2)) == 8


@pytest.mark.parametrize("chosen", [None, "1"])
def test_a_run_leaves_the_number_of_threads_as_it_was(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    if chosen is not None:
        monkeypatch.setenv(VARIABLE, chosen)
    with use_threads(3):
        assert (torch.get_num_threads(), os.environ[VARIABLE]) == (3, "3")
    assert (torch.get_num_threads(), os.environ.get(VARIABLE)) == (before, chosen)

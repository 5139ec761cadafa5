"""CPU threads: those of the config, else the machine's, within the quota of a container and shared among ranks."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from t2i_lm.runtime import threads
from t2i_lm.runtime.threads import CHOSEN, default_threads, processor_quotas, use_threads


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads of torch as before, and no choice in the environment."""
    monkeypatch.setenv(CHOSEN, "1")  # so that it is restored also where a test sets it
    monkeypatch.delenv(CHOSEN)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


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


def test_threads_stay_within_a_quota_unless_they_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_threads() <= 4
    monkeypatch.setattr(threads, "processor_quotas", lambda: iter([1.5, 3.0]))
    assert default_threads() == 2
    use_threads(None)
    assert torch.get_num_threads() == 2
    use_threads(3)
    assert torch.get_num_threads() == 3
    monkeypatch.setenv(CHOSEN, "4")
    torch.set_num_threads(4)
    use_threads(None)
    assert torch.get_num_threads() == 4


def test_ranks_share_the_cores_and_have_the_threads_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "processor_quotas", lambda: iter([4.0]))
    use_threads(None, processes=2)
    assert (torch.get_num_threads(), os.environ[CHOSEN]) == (2, "2")
    monkeypatch.delenv(CHOSEN)
    use_threads(None, processes=8)
    assert torch.get_num_threads() == 1
    use_threads(3, processes=8)
    assert (torch.get_num_threads(), os.environ[CHOSEN]) == (3, "3")

"""The copy of a checkpoint: equal, independent, of one piece of memory that is used again."""

import mmap
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import callbacks.files.staging
from callbacks.files.available_memory import available_memory
from callbacks.files.checkpoint_io import write
from callbacks.files.staging import NoMemoryError, Staging, bytes_of


def content() -> dict[str, Any]:
    """Tensors of several kinds, also shared, sliced and empty, in what a checkpoint consists of."""
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    rows = torch.randn(7, 4)
    return {
        "state_dict": model.state_dict(),
        "parameter": nn.Parameter(torch.randn(3), requires_grad=False),
        "tied": [rows, rows],
        "slice": (rows[2:5, 1:3], rows.mT),
        "kinds": {kind: torch.ones(3).to(kind) for kind in (torch.bfloat16, torch.int64, torch.bool, torch.uint8)},
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(3.5),
        "rest": [1, 2.5, "text", None, {"deep": [torch.arange(3)]}],
    }


def saved(value: Any, path: Path) -> bytes:
    write({"content": value}, path)
    return path.read_bytes()


def test_the_file_of_a_copy_is_that_of_the_original_to_the_last_byte(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original, staging = content(), Staging()
    for prepared in (True, False):
        if prepared:
            staging.prepare(original)
        copied = staging.copy(original)
        assert saved(copied, tmp_path / "copy") == saved(original, tmp_path / "original")
    assert isinstance(copied["state_dict"], OrderedDict)
    assert vars(copied["state_dict"])["_metadata"] == vars(original["state_dict"])["_metadata"]


def test_changing_the_original_leaves_the_copy_as_it_was(tmp_path: Path) -> None:
    original = content()
    before, copied = saved(original, tmp_path / "file"), Staging().copy(original)
    for tensor in (*original["state_dict"].values(), original["tied"][0], original["number"]):
        tensor.fill_(7)
    original["rest"][4]["deep"].append("more")
    assert saved(copied, tmp_path / "file") == before


def test_the_memory_is_that_of_the_state_and_is_used_again() -> None:
    staging, state = Staging(), {"rows": torch.randn(1000, 64)}
    staging.copy(state)
    assert staging.size == bytes_of(state) == 256_000
    memory = staging._memory
    staging.copy({"rows": torch.randn(500, 64), "tied": [state["rows"][0]] * 2})
    larger = {"rows": torch.randn(2000, 64)}
    assert staging._memory is not memory or staging.size >= bytes_of(larger)
    assert torch.equal(staging.copy(larger)["rows"], larger["rows"])
    assert staging.size == bytes_of(larger)


def test_too_little_memory_is_found_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"rows": torch.randn(1000, 64)}
    monkeypatch.setattr(callbacks.files.staging, "available_memory", lambda: 300_000)
    assert Staging().copy(state) is not None
    with pytest.raises(NoMemoryError, match=r"0\.00 GB for a copy of the checkpoint, 0\.00 GB available"):
        Staging(sharers=2).copy(state)
    monkeypatch.setattr(callbacks.files.staging, "available_memory", lambda: None)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(NoMemoryError, match="Cannot allocate memory"):
        Staging().prepare(state)


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_of_the_group_or_of_one_above_counts(tmp_path: Path, version: int) -> None:
    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert available_memory(tmp_path) is None
    put("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_memory(tmp_path) == 8000 * 1024
    if version == 2:
        put("proc/self/cgroup", "0::/job/step\n")
        put("sys/fs/cgroup/job/step/memory.max", "max\n")
        put("sys/fs/cgroup/job/step/memory.current", "10\n")
        put("sys/fs/cgroup/job/memory.max", "5000\n")
        put("sys/fs/cgroup/job/memory.current", "4000\n")
        put("sys/fs/cgroup/job/memory.stat", "anon 1\ninactive_file 700\n")
    else:
        put("proc/self/cgroup", "4:memory:/job\n3:cpu:/\n0::/\n")
        put("sys/fs/cgroup/memory/memory.limit_in_bytes", "5000\n")  # seen from inside a container
        put("sys/fs/cgroup/memory/memory.usage_in_bytes", "4000\n")
        put("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 700\n")
    assert available_memory(tmp_path) == 1700

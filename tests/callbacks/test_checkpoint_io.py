import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from callbacks import CorruptCheckpointError, DurableCheckpointIO, EventLog, find_resumable

IO = DurableCheckpointIO()


def save(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:08d}.ckpt"
    IO.save_checkpoint({"global_step": step, "weights": torch.arange(2000) + step}, path)
    return path


def test_a_checkpoint_reads_back(tmp_path: Path) -> None:
    again = IO.load_checkpoint(save(tmp_path, 3))
    assert again["global_step"] == 3
    assert torch.equal(again["weights"], torch.arange(2000) + 3)
    assert not list(tmp_path.glob("*.tmp"))


def test_every_bit_flip_and_truncation_is_noticed_and_the_one_before_is_used(tmp_path: Path) -> None:
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    whole, rng = new.read_bytes(), random.Random(0)
    for trial in range(100):
        damaged = bytearray(whole)
        if trial % 2:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(damaged)) :]
        new.write_bytes(damaged)
        with pytest.raises(CorruptCheckpointError):
            IO.load_checkpoint(new)
        assert find_resumable(tmp_path) == old
    new.write_bytes(whole)
    assert find_resumable(tmp_path) == new


def test_a_checkpoint_without_its_digest_does_not_count(tmp_path: Path) -> None:
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    new.with_name(f"{new.name}.sha256").unlink()
    events = EventLog(tmp_path / "events.log")
    assert find_resumable(tmp_path, events) == old
    assert events.counts() == {"corrupt-checkpoint": 1}


def test_swapped_files_are_noticed(tmp_path: Path) -> None:
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    new.write_bytes(old.read_bytes())
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        IO.load_checkpoint(new)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path: Path) -> None:
    """A real limit on file size in a process of its own stands in for the full disk."""
    old = save(tmp_path, 1)
    code = f"""
import resource, signal, torch
from pathlib import Path
from callbacks import DurableCheckpointIO
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    DurableCheckpointIO().save_checkpoint({{"w": torch.zeros(100_000)}}, Path({str(old)!r}))
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "could not write checkpoint" in done.stdout, done.stderr
    assert "earlier checkpoints are intact" in done.stdout
    assert IO.load_checkpoint(old)["global_step"] == 1
    assert not list(tmp_path.glob("*.tmp"))

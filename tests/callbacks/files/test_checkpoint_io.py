"""Checkpoint files: damaged ones are never read, a failed write leaves older ones intact."""

import errno
import hashlib
import os
import random
import stat
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from callbacks import CorruptCheckpointError, DurableCheckpointIO, EventLog, find_resumable
from callbacks.checkpoints import checkpoint_path
from callbacks.files.checkpoint_io import digest_of, digests, leftovers, verify


def content(seed: int) -> dict[str, Any]:
    """A small checkpoint, different for each seed."""
    return {"weights": torch.randn(64, generator=torch.Generator().manual_seed(seed)), "global_step": seed}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two whole checkpoints, of steps 1 and 2."""
    for step in (1, 2):
        DurableCheckpointIO().save_checkpoint(content(step), checkpoint_path(tmp_path, step))
    return tmp_path


def damage(path: Path, draw: random.Random) -> None:
    """Flips one bit, cuts the end off, or adds to it."""
    data = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "cut", "grow"])
    if kind == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    else:
        data += draw.randbytes(draw.randint(1, 100))
    path.write_bytes(data)


def test_a_saved_checkpoint_is_loaded_equal(folder: Path) -> None:
    loaded = DurableCheckpointIO().load_checkpoint(checkpoint_path(folder, 2))
    assert loaded["global_step"] == 2
    assert torch.equal(loaded["weights"], content(2)["weights"])


def test_the_digest_is_one_that_sha256sum_checks(folder: Path) -> None:
    path = checkpoint_path(folder, 2)
    assert digests(path) == [hashlib.sha256(path.read_bytes()).hexdigest()]
    subprocess.run(["sha256sum", "--check", "--strict", digest_of(path).name], cwd=folder, check=True)


def test_each_of_a_hundred_damages_is_detected_before_reading_and_falls_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*_: Any, **__: Any) -> None:
        raise AssertionError("a damaged checkpoint was opened")

    newest, intact = checkpoint_path(folder, 2), checkpoint_path(folder, 2).read_bytes()
    monkeypatch.setattr(torch, "load", unread)
    events = EventLog(folder / "events.log")
    draw = random.Random(0)
    for _ in range(100):
        damage(newest, draw)
        assert newest.read_bytes() != intact
        with pytest.raises(CorruptCheckpointError, match=newest.name):
            DurableCheckpointIO().load_checkpoint(newest)
        assert find_resumable(folder, events.write) == checkpoint_path(folder, 1)
        newest.write_bytes(intact)
    assert events.counts() == {"corrupt-checkpoint": 100}


@pytest.mark.parametrize("lost", ["checkpoint", "digest", "digest emptied"])
def test_a_missing_half_counts_as_no_checkpoint(folder: Path, lost: str) -> None:
    newest = checkpoint_path(folder, 2)
    if lost == "digest emptied":
        digest_of(newest).write_bytes(b"")
    else:
        (newest if lost == "checkpoint" else digest_of(newest)).unlink()
    with pytest.raises(CorruptCheckpointError, match=newest.name):
        verify(newest)
    assert find_resumable(folder) == checkpoint_path(folder, 1)


def test_a_swapped_file_is_detected(folder: Path) -> None:
    one, two = checkpoint_path(folder, 1), checkpoint_path(folder, 2)
    two.write_bytes(one.read_bytes())
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        verify(two)


def test_without_any_whole_checkpoint_there_is_nothing_to_resume(tmp_path: Path, folder: Path) -> None:
    assert find_resumable(tmp_path / "absent") is None
    for step in (1, 2):
        checkpoint_path(folder, step).write_bytes(b"")
    assert find_resumable(folder) is None


def failing(operation: Any, at: int) -> Any:
    """`operation`, with a full disk at its call number `at`."""
    calls = 0

    def wrapper(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(28, "No space left on device")
        return operation(*arguments, **options)

    return wrapper


@pytest.mark.parametrize("at", range(1, 4))
@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_full_disk_at_any_sync_or_rename_leaves_earlier_files_intact(
    folder: Path, monkeypatch: pytest.MonkeyPatch, operation: str, at: int
) -> None:
    # A new step, and one that is there already and must stay valid.
    for step in (2, 3):
        target = checkpoint_path(folder, step)
        before = {path.name: path.read_bytes() for path in folder.glob("*.ckpt")}
        with monkeypatch.context() as patch:
            patch.setattr(os, operation, failing(getattr(os, operation), at))
            if (operation, at) == ("replace", 3):  # there are two renames
                DurableCheckpointIO().save_checkpoint(content(7), target)
                continue
            with pytest.raises(OSError, match=r"could not write checkpoint .* No space left .* are intact"):
                DurableCheckpointIO().save_checkpoint(content(7), target)
        if (operation, at) == ("fsync", 3):  # the folder's own: both renames are done
            verify(target)
            continue
        assert {path.name: path.read_bytes() for path in folder.glob("*.ckpt")} == before
        for path in folder.glob("*.ckpt"):
            verify(path)
        assert not list(folder.glob("*.tmp"))


def test_a_file_system_that_cannot_sync_folders_is_written_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFS and VirtualBox's shared folders answer EINVAL."""
    sync = os.fsync

    def files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(handle)

    monkeypatch.setattr(os, "fsync", files_alone)
    DurableCheckpointIO().save_checkpoint(content(7), checkpoint_path(folder, 7))
    verify(checkpoint_path(folder, 7))


def test_a_full_disk_at_any_write_leaves_earlier_files_intact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    class FullFile:
        def __init__(self, file: Any, at: int) -> None:
            self.file, self.write = file, failing(file.write, at)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> "FullFile":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    opened = Path.open
    failures = 0
    for at in range(1, 200):
        with monkeypatch.context() as patch:
            patch.setattr(
                Path,
                "open",
                lambda path, mode="r", at=at, **how: (
                    FullFile(opened(path, mode, **how), at) if mode == "wb" else opened(path, mode, **how)
                ),
            )
            try:
                DurableCheckpointIO().save_checkpoint(content(3), checkpoint_path(folder, 3))
            except OSError as error:
                failures += "No space left on device" in str(error)
            else:
                break
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert failures > 10
    verify(checkpoint_path(folder, 3))


def test_overwriting_keeps_the_old_file_valid_until_the_new_one_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace, seen = checkpoint_path(folder, 2), os.replace, []

    def watched(source: Any, destination: Any) -> None:
        verify(target)
        replace(source, destination)
        verify(target)
        seen.append(Path(destination).name)

    monkeypatch.setattr(os, "replace", watched)
    DurableCheckpointIO().save_checkpoint(content(9), target)
    assert seen == [digest_of(target).name, target.name]
    assert DurableCheckpointIO().load_checkpoint(target)["global_step"] == 9


def test_an_unreadable_state_is_refused_when_saved(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"weights_only=True: it holds .*Path"):
        DurableCheckpointIO().save_checkpoint({"state": Path("x")}, checkpoint_path(folder, 3))
    with pytest.raises(TypeError, match="numpy"):
        DurableCheckpointIO().save_checkpoint({"state": np.zeros(2)}, checkpoint_path(folder, 3))
    assert not checkpoint_path(folder, 3).exists()
    assert find_resumable(folder) == checkpoint_path(folder, 2)


def test_a_crafted_file_runs_nothing(folder: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(folder / "ran"),))

    target = checkpoint_path(folder, 3)
    torch.save({"state": Payload()}, target)
    digest_of(target).write_text(hashlib.sha256(target.read_bytes()).hexdigest())
    with pytest.raises(Exception, match="weights_only"):
        DurableCheckpointIO().load_checkpoint(target, weights_only=False)
    assert not (folder / "ran").exists()


def test_removing_deletes_the_digest_and_leftovers_are_those_of_killed_saves(folder: Path) -> None:
    DurableCheckpointIO().remove_checkpoint(checkpoint_path(folder, 1))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002.ckpt", "step-00000002.ckpt.sha256"]
    (folder / "step-00000003.ckpt.tmp").touch()
    (folder / "step-00000003.ckpt.sha256.tmp").touch()
    (folder / "step-00000003.ckpt.sha256").touch()
    (folder / "mine.tmp").touch()
    found = {path.name.removeprefix("step-00000003.ckpt") for path in leftovers(folder)}
    assert found == {".tmp", ".sha256.tmp", ".sha256"}, "files of others stay"
    verify(checkpoint_path(folder, 2))

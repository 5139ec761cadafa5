"""Folders with one writer: refusals, and takeovers from processes that are gone."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from t2i_lm.storage import owner
from t2i_lm.storage.owner import OwnedError, Owner, own, require_free

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
fork = multiprocessing.get_context("fork")
# Pairs of processes that begin together: 2, and 20 in `make test-faults`.
ATTEMPTS = 2 * int(os.environ.get("T2I_LM_RANKS", "1"))


def hold(file: Path) -> None:
    with own(file):
        file.with_name("held").touch()
        time.sleep(60)


@contextmanager
def holding(file: Path) -> Iterator[BaseProcess]:
    """Another process that owns `file`."""
    process = fork.Process(target=hold, args=(file,))
    process.start()
    while not file.with_name("held").exists():
        time.sleep(0.005)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def entry(file: Path, **changes: object) -> None:
    """Writes the file of an owner that differs from this process by `changes`."""
    me = Owner.of_this_process()
    file.write_text(json.dumps({**vars(me), **changes}))


def test_a_second_process_is_refused_with_who_holds_it(tmp_path: Path) -> None:
    file = tmp_path / "owner.json"
    with holding(file) as process:
        for attempt in (own, require_free):
            with pytest.raises(OwnedError, match=rf"{tmp_path} is being written by process {process.pid} on .+ since"):
                attempt(file)
        os.kill(process.pid or 0, signal.SIGSTOP)  # stands still, and still owns
        with pytest.raises(OwnedError):
            own(file)
        os.kill(process.pid or 0, signal.SIGCONT)


def test_ownership_ends_with_its_block_and_leaves_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        with own(tmp_path / "owner.json"), pytest.raises(OwnedError):
            own(tmp_path / "owner.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_is_succeeded_at_once(tmp_path: Path, reaped: bool) -> None:
    file = tmp_path / "owner.json"
    with holding(file) as process:
        process.kill()
        if reaped:
            process.join()
        else:
            os.waitid(os.P_PID, process.pid or 0, os.WEXITED | os.WNOWAIT)  # ended, but its parent has not asked
        require_free(file)
        with own(file) as mine:
            assert json.loads(file.read_text())["pid"] == mine.owner.pid == os.getpid()


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({"born": "1"}, False),  # the process id was given to a later process
        ({"pid": 2**22 + 1}, False),
        ({"machine": "other", "host": "node7"}, True),  # touched lately
    ],
)
def test_who_counts_as_gone(tmp_path: Path, changes: dict[str, object], held: bool) -> None:
    file = tmp_path / "owner.json"
    entry(file, **changes)
    if held:
        with pytest.raises(OwnedError, match="on node7 since"):
            own(file)
    else:
        own(file).release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_file_that_is_not_yet_written_counts_as_held(tmp_path: Path, content: str) -> None:
    (tmp_path / "owner.json").write_text(content)
    with pytest.raises(OwnedError, match="a process that has just started"):
        own(tmp_path / "owner.json")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(owner, "STALE_S", 0.2)


@pytest.mark.usefixtures("fast")
def test_a_process_on_another_machine_holds_it_as_long_as_it_touches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "HEARTBEAT_S", 0.4)  # watched for a second
    file = tmp_path / "owner.json"
    entry(file, machine="other")
    old = time.time() - 1000
    os.utime(file, (old, old))

    def touch() -> None:
        for second in range(1, 900):
            os.utime(file, (old + second, old + second))  # by a clock that is late
            time.sleep(0.02)

    process = fork.Process(target=touch, daemon=True)
    process.start()
    while file.stat().st_mtime == old:
        time.sleep(0.005)
    with pytest.raises(OwnedError):
        own(file)
    process.kill()
    process.join()
    own(file).release()


@pytest.mark.usefixtures("fast")
def test_an_owner_touches_its_file(tmp_path: Path) -> None:
    file = tmp_path / "owner.json"
    with own(file):
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_mtime > 0


def compete(file: Path, rounds: int) -> None:
    inside = file.with_name("inside")
    while rounds:
        try:
            with own(file):
                inside.mkdir()  # fails if another process is inside
                time.sleep(0.001)
                inside.rmdir()
                rounds -= 1
        except OwnedError:
            time.sleep(0.001)


def in_parallel(target: Callable[..., None], *arguments: object) -> list[int | None]:
    processes = [fork.Process(target=target, args=arguments) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_of_many_processes_one_at_a_time_succeeds_a_dead_one(tmp_path: Path) -> None:
    for _ in range(3):
        entry(tmp_path / "owner.json", born="1")
        assert in_parallel(compete, tmp_path / "owner.json", 3) == [0] * 5
        assert not list(tmp_path.iterdir())


def try_to_own(file: Path, together: Any, answers: Any, over: Any) -> None:
    together.wait()
    try:
        with own(file):
            answers.put((os.getpid(), ""))
            over.wait(30)
    except OwnedError as error:
        answers.put((os.getpid(), str(error)))


@pytest.mark.parametrize("attempt", range(ATTEMPTS))
def test_of_two_processes_that_begin_together_one_is_refused_and_names_the_other(tmp_path: Path, attempt: int) -> None:
    together, answers, over = fork.Barrier(2), fork.Queue(), fork.Event()
    given = (tmp_path / "owner.json", together, answers, over)
    processes = [fork.Process(target=try_to_own, args=given) for _ in range(2)]
    for process in processes:
        process.start()
    said = dict(answers.get(timeout=30) for _ in range(2))
    over.set()
    for process in processes:
        process.join()
    (winner,) = (pid for pid, error in said.items() if not error)
    (error,) = (error for error in said.values() if error)
    assert f"is being written by process {winner} on" in error

"""A rank that dies, stops, hangs or never arrives ends the run on the others, which name it."""

import atexit
import os
import re
import signal
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.distributed import _destroy_dist_connection

from callbacks import EventLog
from t2i_lm.runtime import rank_watch
from t2i_lm.runtime.rank_beats import Limits
from tests.callbacks.toy_model import Toy
from tests.callbacks.toy_run import EVENTS, finish, free_port, lines, start

pytestmark = pytest.mark.slow

RANK_S = 3.0


def start_ranks(folder: Path, rank_s: float = RANK_S, world: int = 2, **harm: Any) -> list[BaseProcess]:
    port = free_port()
    batch_size = 4 * world
    return [
        start(Toy(folder, rank=rank, world=world, port=port, rank_s=rank_s, batch_size=batch_size, harm=harm))
        for rank in range(world)
    ]


def errors(folder: Path, rank: int) -> list[str]:
    """The lines of a rank's output that say why it ends."""
    text = (folder / ("output.txt" if rank == 0 else f"output.txt.{rank}")).read_text()
    return [line for line in text.splitlines() if line.startswith("error: ")]


def in_step(step: int, **harm: Any) -> dict[str, Any]:
    return {"at_step": step - 1, **harm}


def test_a_stopped_rank_is_named_by_the_other_and_leaves_no_process(tmp_path: Path) -> None:
    ranks = start_ranks(tmp_path, **in_step(14, signal_in="step", signal=signal.SIGSTOP, ranks=[1]))
    assert finish(*ranks) == [1, -signal.SIGKILL]  # killed by the other, since both are on this machine
    (line,) = errors(tmp_path, 0)
    assert f"rank 1 of 2 ({os.uname().nodename}, process {ranks[1].pid}) has not answered for 3 s" in line
    assert f"newest checkpoint is that of step 10; continue with --resume {tmp_path}" in line
    assert EventLog(tmp_path / EVENTS).counts() == {"rank-lost": 1}
    assert finish(*start_ranks(tmp_path)) == [0, 0]
    assert lines(tmp_path)[-1]["step"] == 24


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_arrives_is_named(tmp_path: Path, rank: int) -> None:
    port = free_port()
    toy = Toy(tmp_path, rank=1 - rank, world=2, port=port, rank_s=RANK_S, harm={"phase_s": RANK_S})
    assert finish(start(toy)) == [1]
    (line,) = errors(tmp_path, 1 - rank)
    assert re.search(rf"rank {rank} of 2 did not arrive at 127\.0\.0\.1:{port} within \d+ s", line)
    assert "start the run again" in line


def test_a_rank_that_arrives_late_is_waited_for(tmp_path: Path) -> None:
    port = free_port()
    first = start(Toy(tmp_path, world=2, port=port, rank_s=RANK_S, steps=2))
    time.sleep(2 * RANK_S)
    assert finish(first, start(Toy(tmp_path, rank=1, world=2, port=port, rank_s=RANK_S, steps=2))) == [0, 0]


def test_a_rank_that_fails_does_not_wait_for_the_shutdown_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning registers it to be called at exit."""
    forgotten: list[object] = []
    monkeypatch.setattr(atexit, "unregister", forgotten.append)
    with suppress(OSError), rank_watch.RankWatch(0, 2, Limits(3, 3)):
        raise OSError("full disk")
    assert forgotten == [_destroy_dist_connection]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_refuses_the_run_ends_the_others_with_its_reason(tmp_path: Path, rank: int) -> None:
    codes = finish(*start_ranks(tmp_path, rank_s=60, refused_by=rank), timeout=30)
    assert (codes[rank], codes[1 - rank]) == (2, 1)
    assert errors(tmp_path, rank) == ["error: the config differs"]
    (line,) = errors(tmp_path, 1 - rank)
    assert re.search(rf"rank {rank} of 2 \(.*\) failed building .*: ValueError: the config differs\.", line)

"""Which rank ends a run: the one that is silent, dead, absent or behind, never one that waits or works long."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest

from t2i_lm.runtime.rank_beats import Beat, Ledger, Limits, Verdict

LIMITS = Limits(rank_s=60, phase_s=1800)
NONE: Mapping[int, "subprocess.Popen[bytes]"] = {}
MINE = Beat(0, "a", "elsewhere", 1, None)


def ledger(*ranks: int, world: int = 0, children: Mapping[int, "subprocess.Popen[bytes]"] = NONE) -> Ledger:
    """Of rank 0, which has just heard from some ranks."""
    world = world or len(ranks)
    made = Ledger(range(world), world, LIMITS, "a:1", 0.0, "here", children)
    for rank in ranks:
        made.note(beat(rank), 0.0)
    return made


def beat(rank: int, number: int = 1, **more: object) -> Beat:
    return replace(Beat(rank, f"node{rank}", "elsewhere", 100 + rank, None, number), **{"phase": "training", **more})


def test_beats_and_verdicts_are_read_as_written() -> None:
    one = beat(1, ended="full", cut=True)
    assert Beat.loads(one.dumps()) == one
    verdict = Verdict("why", (1, 2), (one,), True)
    assert Verdict.loads(verdict.dumps()) == verdict


def test_a_silent_rank_is_named_after_the_limit_with_its_place() -> None:
    ranks = ledger(0, 1, 2)
    for second in range(1, 62):
        assert second == 61 or ranks.verdict(second - 0.5, MINE) is None
        for rank in (0, 2):
            ranks.note(beat(rank, second, place=5), second)
        ranks.note(beat(1, 1, step=7), second)  # the store still has its old beat
    verdict = ranks.verdict(61, MINE)
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert verdict.text == (
        "rank 1 of 3 (node1, process 101) has not answered for 60 s (trainer.rank_timeout=60), last seen in step 7"
    )


@pytest.mark.parametrize(("change", "limit"), [({"cut": True}, 5), ({"signal": 15}, 15)])
def test_broken_connections_and_signals_shorten_the_silence(change: dict[str, int], limit: int) -> None:
    for more in (-0.1, 0.1):
        ranks = ledger(0, 1)
        ranks.note(beat(0, 2, **change), limit + more)
        assert (ranks.verdict(limit + more, MINE) is None) == (more < 0)


def moved(ranks: Ledger, rank: int, now: float, number: int, **more: object) -> None:
    ranks.note(beat(rank, number, moves=number, **more), now)


def test_the_rank_behind_is_named_and_not_those_that_wait_for_it() -> None:
    ranks = ledger(0, 1)
    moved(ranks, 0, 1, 2, place=3, step=2)
    moved(ranks, 1, 1, 2, place=2, step=2, phase="drawing")
    for second in range(2, 63):
        for rank, place in ((0, 3), (1, 2)):
            phase = "training" if rank == 0 else "drawing"
            ranks.note(beat(rank, second + 1, moves=2, place=place, step=2, phase=phase), second)
    verdict = ranks.verdict(62, MINE)
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert verdict.stuck
    assert "has made no progress for 61 s, reading the batch of step 2, while rank 0 waits" in verdict.text


def test_a_rank_behind_that_moves_or_works_long_is_waited_for() -> None:
    for phase, slowest, fine in (("training", 0, False), ("validating", 0, True), ("training", 100, True)):
        ranks = ledger(0, 1)
        moved(ranks, 0, 1, 2, place=3)
        moved(ranks, 1, 1, 2, place=2, phase=phase, slowest=slowest)
        for second in range(2, 150):
            ranks.note(beat(0, second + 1, moves=2, place=3), second)
            ranks.note(beat(1, second + 1, moves=2, place=2, phase=phase, slowest=slowest), second)
        assert (ranks.verdict(149, MINE) is None) == fine
        ranks.note(beat(1, 200, moves=3, place=2, phase=phase), 150)
        assert ranks.verdict(151, MINE) is None


def test_a_rank_at_the_same_place_that_moves_may_be_waited_for() -> None:
    ranks = ledger(0, 1)
    for second in range(1, 4000):
        ranks.note(beat(0, second + 1, phase="building", place=0), second)
        ranks.note(beat(1, second + 1, phase="building", place=0, moves=second), second)
    assert ranks.verdict(3999, MINE) is None


def test_all_ranks_are_named_where_none_is_behind() -> None:
    ranks = ledger(0, 1, 2)
    for second in range(1, 62):
        for rank in range(3):
            ranks.note(beat(rank, second + 1, step=3), second)
    verdict = ranks.verdict(61, MINE)
    assert verdict is not None
    assert "and ranks 1, 2 have made no progress for 61 s, in step 3" in verdict.text


def test_a_rank_that_failed_is_quoted_once_the_others_could_have_ended_too() -> None:
    ranks = ledger(0, 1)
    ranks.note(beat(1, 2, ended="OutOfMemoryError: full", step=4), 10)
    assert ranks.verdict(12, MINE) is None
    verdict = ranks.verdict(14, MINE)
    assert verdict is not None
    assert verdict.text.endswith("failed in step 4: OutOfMemoryError: full")
    assert ranks.verdict(10.1, replace(MINE, cut=True)) is not None


def test_a_rank_that_is_done_is_never_missed() -> None:
    ranks = ledger(0, 1)
    ranks.note(beat(1, 2, ended=""), 10)
    ranks.note(beat(0, 9, moves=2), 4000)
    assert ranks.verdict(4001, MINE) is None


def test_ranks_that_never_arrive_are_named_with_the_address() -> None:
    ranks = ledger(0, 2, world=4)
    for now in (61, 1799):  # a slow file system may hold up the packages of one
        ranks.note(beat(0, now), now)
        ranks.note(beat(2, now), now)
        assert ranks.verdict(now, MINE) is None
    verdict = ranks.verdict(1801, MINE)
    assert verdict is not None
    assert verdict.ranks == (1, 3)
    assert verdict.text.startswith("ranks 1, 3 of 4 did not arrive at a:1 within 1801 s (trainer.phase_timeout=1800)")


def test_the_time_in_which_a_process_was_stopped_itself_does_not_count() -> None:
    ranks = ledger(0, 1)
    ranks.away(500)
    assert ranks.verdict(510, MINE) is None
    assert ranks.verdict(561, MINE) is not None


def test_a_process_of_this_machine_that_has_ended_is_dead_without_a_wait() -> None:
    ranks = ledger(0, 1)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    ranks.note(replace(beat(1, 2, step=4), machine="here", pid=process.pid), 10)
    assert ranks.verdict(10, MINE) is None
    verdict = ranks.verdict(13, MINE)
    assert verdict is not None
    assert verdict.text.endswith(f"process {process.pid}) has died, last seen in step 4")
    alive = ledger(0, 1)
    alive.note(replace(beat(1, 2), machine="here", pid=os.getpid()), 10)
    assert alive.verdict(10, MINE) is alive.verdict(14, MINE) is None


def test_a_launched_process_may_start_slowly_but_not_end() -> None:
    code = "import sys; sys.stdin.read(); sys.exit(3)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    ranks = ledger(0, world=2, children={1: process})
    ranks.note(beat(0, 2), 600)
    assert ranks.verdict(600, MINE) is None
    process.communicate()
    assert ranks.verdict(601, MINE) is None
    verdict = ranks.verdict(604, MINE)
    assert verdict is not None
    assert verdict.text == f"rank 1 of 2 (process {process.pid}) ended with code 3 before it met the others"

"""Progress: a bar on a terminal, plain lines in a log, nothing on other ranks."""

import os
import pty
import re
import select
import sys
from pathlib import Path

import pytest

from tests.callbacks.toy_model import Toy
from tests.callbacks.toy_run import finish, free_port, run, run_to_end, server, start

LINE = re.compile(
    r"^step (\d+)/24  [\d,]+ tokens/s  text \d\.\d{3}  image \d\.\d{3}  boundary \d\.\d{3}  all \d\.\d{3}  "
    r"ETA \d+:\d\d$"
)


def plain_steps(output: str) -> list[int]:
    """Steps of the progress lines."""
    return [int(found[1]) for found in map(LINE.match, output.splitlines()) if found]


@pytest.mark.slow
def test_a_pipe_gets_one_plain_line_per_interval_with_losses_and_time_left(tmp_path: Path) -> None:
    assert run_to_end(Toy(tmp_path)) == 0
    output = (tmp_path / "output.txt").read_text()
    assert plain_steps(output) == [4, 8, 12, 16, 20, 24]
    assert output.count("step ") == 6
    assert "\x1b" not in output
    assert "\r" not in output


@pytest.mark.slow
def test_rank_1_prints_nothing(tmp_path: Path) -> None:
    port = free_port()
    ranks = [Toy(tmp_path, rank=rank, world=2, port=port) for rank in range(2)]
    assert finish(*[start(rank) for rank in ranks]) == [0, 0]
    assert plain_steps(ranks[0].log.read_text()) == [4, 8, 12, 16, 20, 24]
    assert "step" not in ranks[1].log.read_text()


def run_in_terminal(toy: Toy, terminal: str, term: str) -> None:
    os.setsid()
    device = os.open(terminal, os.O_RDWR)
    for stream in range(3):
        os.dup2(device, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.environ |= {"TERM": term, "COLUMNS": "150"}
    sys.exit(run(toy))


def in_terminal(folder: Path, term: str) -> str:
    """Output of a run in a terminal of that type."""
    ours, theirs = pty.openpty()
    process = server.Process(target=run_in_terminal, args=(Toy(folder), os.ttyname(theirs), term))
    process.start()
    shown = b""
    while process.is_alive() or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            shown += os.read(ours, 65536)
    for end in (ours, theirs):
        os.close(end)
    assert finish(process) == [0], shown.decode()
    return shown.decode()


@pytest.mark.slow
def test_a_terminal_gets_a_bar_that_ends_full_and_restores_the_cursor(tmp_path: Path) -> None:
    shown = in_terminal(tmp_path, "xterm-256color")
    assert "24/24" in shown
    assert re.search(r"tokens/s  text \d\.\d{3}  image \d\.\d{3}", shown)
    assert "step 24/24" not in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0


@pytest.mark.slow
def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    assert plain_steps(in_terminal(tmp_path, "dumb").replace("\r", "")) == [4, 8, 12, 16, 20, 24]

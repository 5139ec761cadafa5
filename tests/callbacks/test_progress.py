"""Progress: a bar on a terminal, plain lines in a log, nothing on other ranks."""

import os
import pty
import re
import select
import sys
from pathlib import Path

import pytest

from tests.callbacks.toy_model import Toy
from tests.callbacks.toy_run import finish, free_port, run_to_end, start

LINE = re.compile(
    r"^step (\d+)/24  [\d,]+ tokens/s  text \d\.\d{3}  image \d\.\d{3}  boundary \d\.\d{3}  all \d\.\d{3}  "
    r"ETA \d+:\d\d$"
)
RUN = """
import sys
from pathlib import Path

import pytest
from tests.callbacks.toy_model import Toy
from tests.callbacks.toy_run import run
sys.exit(run(Toy(Path(sys.argv[1]))))
"""


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


def in_terminal(folder: Path, term: str) -> str:
    """Output of a run in a terminal of that type."""
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover
        os.environ |= {"TERM": term, "COLUMNS": "150", "PYTHONPATH": os.pathsep.join(sys.path)}
        os.execv(sys.executable, [sys.executable, "-W", "ignore", "-c", RUN, str(folder)])
    shown = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown.decode()
    os.close(terminal)
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

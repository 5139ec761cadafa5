"""Standard streams that never end a run, and the one line of an error."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from t2i_lm.runtime.command_line import command_parser, exit_code
from t2i_lm.runtime.output import EscapingOutput

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PRINTS = """
import sys
from t2i_lm.runtime.command_line import exit_code
from rich.console import Console
def body():
    console = Console()
    for n in range(3000):
        print("läufe 图片 \\ud83d \\udce5", n)
        if n % 100 == 0:
            console.print("图片 läufe")
    print("done", file=sys.stderr)
    return 0
sys.exit(exit_code(body))
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_no_character_is_an_error_in_any_encoding(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == b"done"
    assert done.stdout.decode(encoding).count("\\ud83d") == 3000


@pytest.mark.parametrize("closed", ["head -1", "true", "sleep 0"])
def test_a_reader_that_stops_reading_is_no_error(closed: str) -> None:
    command = f'{{ {sys.executable} -c "$CODE"; echo $? >&2; }} | {closed} > /dev/null'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | {"CODE": PRINTS}, capture_output=True)
    assert done.stderr.decode().split() == ["done", "0"]


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "> /dev/full"])
def test_a_closed_stream_or_a_full_disk_is_no_error(redirection: str) -> None:
    command = f'{sys.executable} -c "$CODE" {redirection}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | {"CODE": PRINTS}, capture_output=True)
    assert done.returncode == 0, done.stderr


def failing() -> int:
    raise ValueError("data.path=x: expected a folder")


def test_an_error_is_one_line_and_debug_shows_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("T2I_LM_DEBUG", raising=False)
    assert exit_code(failing) == 2
    assert capsys.readouterr().err == "error: data.path=x: expected a folder\n"
    monkeypatch.setenv("T2I_LM_DEBUG", "0")  # restored after the test, unlike what --debug sets
    command_parser("train", "", "").parse_args(["--debug"])
    assert exit_code(failing) == 2
    *trace, last = capsys.readouterr().err.splitlines()
    assert trace[0].startswith("Traceback")
    assert last == "error: data.path=x: expected a folder"


def test_a_fault_of_the_code_keeps_its_traceback() -> None:
    def body() -> int:
        return len(3)

    with pytest.raises(TypeError):
        exit_code(body)


def test_an_error_without_a_message_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise MemoryError

    assert exit_code(body) == 2
    assert capsys.readouterr().err == "error: MemoryError\n"


def test_control_characters_reach_no_stream() -> None:
    raw = io.BytesIO()
    stream = EscapingOutput(raw, "utf-8", write_through=True)
    print("a\x1b]0;owned\x07\x1b[2J\x9b31m\rb\u202ec\tläufe 图片", file=stream)
    assert raw.getvalue().decode() == "a\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\rb\\u202ec\tläufe 图片\n"


def test_a_bar_may_move_the_cursor() -> None:
    raw = io.BytesIO()
    stream = EscapingOutput(raw, "utf-8", write_through=True)
    Console(file=stream, force_terminal=True, color_system="standard").print("[red]a[/red]")
    assert b"\x1b[31m" in raw.getvalue()

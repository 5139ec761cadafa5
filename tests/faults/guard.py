"""A child process that reads one hostile file, watched for code, processes, network, other files, time and memory."""

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from t2i_lm.runtime.command_line import exit_code

# Seconds of the wall clock after which a child is ended: a hang. Its processor time is judged, as machines are busy.
PATIENCE_S = 30
FORBIDDEN = (
    *("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "ctypes.dlopen"),
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn"),
)
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")


@dataclass
class Outcome:
    """What reading a file did.

    Attributes:
        code: exit code of the command; None if the child was ended.
        output: its standard output and error.
        forbidden: network, processes and files outside of its folder.
        planted: modules imported from its folder.
        seconds: of the processor.
        megabytes: memory at its peak, above that before.
    """

    code: int | None
    output: str = ""
    forbidden: list[str] = field(default_factory=list)
    planted: list[str] = field(default_factory=list)
    seconds: float = 0.0
    megabytes: float = 0.0


def watched(body: Callable[[], object], folder: Path) -> Outcome:
    """Runs `body` as a command in a forked child that may write below `folder` alone."""
    output = folder.with_name(f"{folder.name}.out")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            outcome = _child(body, folder.resolve(), output)
            os.write(writer, json.dumps(asdict(outcome)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    answer = b""
    deadline = time.monotonic() + PATIENCE_S
    while (left := deadline - time.monotonic()) > 0 and select.select([reader], [], [], left)[0]:
        if not (part := os.read(reader, 1 << 20)):
            break
        answer += part
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    _, _, used = os.wait4(child, 0)
    seconds = used.ru_utime + used.ru_stime
    written = output.read_text(errors="replace") if output.exists() else ""
    if not answer:
        return Outcome(None, written, seconds=seconds)
    found = json.loads(answer)
    return Outcome(**found | {"seconds": seconds, "output": written})


def _child(body: Callable[[], object], folder: Path, output: Path) -> Outcome:
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False)  # type: ignore[misc]
    outcome = Outcome(None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _memory("VmRSS")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and _writes(arguments) and _outside(arguments[0], folder)
        changes = event in CHANGES and any(_outside(path, folder) for path in arguments[:2] if isinstance(path, str))
        if event in FORBIDDEN or writes or changes:
            outcome.forbidden.append(f"{event} {str(arguments[:2])[:200]}")

    sys.addaudithook(hook)

    def run() -> int:
        body()
        return 0

    try:
        outcome.code = exit_code(run)
    except BaseException:
        traceback.print_exc()
        outcome.code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    outcome.megabytes = (_memory("VmHWM") - before) / 1e6
    files = (str(getattr(module, "__file__", None)) for module in list(sys.modules.values()))
    outcome.planted = [file for file in files if file.startswith(str(folder))]
    return outcome


def _writes(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _outside(path: Any, folder: Path) -> bool:
    if isinstance(path, int):
        return False
    name = os.path.realpath(os.fsdecode(path))
    return not name.startswith((str(folder), "/dev/null", "/dev/shm", "/proc/self"))


def _memory(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

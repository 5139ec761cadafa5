"""One writer of a folder or file: a file that names the process that owns it, on local and network file systems.

The file is created exclusively (O_EXCL), names its owner's host, process id and start, and is touched every
`HEARTBEAT_S`. An owner on this machine holds it as long as its process exists, also while that is stopped; one on
another machine until it has not been touched for `STALE_S`. After that the next process takes it over.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from t2i_lm.storage.writing import writing

# Seconds between touches; without one for `STALE_S`, an owner on another machine counts as gone.
HEARTBEAT_S, STALE_S = 5.0, 60.0


@dataclass(frozen=True)
class Owner:
    """The process that owns a file.

    Attributes:
        host: name of its machine, for people.
        machine: identifies the machine's boot and process namespace, within which process ids are compared.
        pid: process id.
        born: start of the process, which tells it from a later one with the same id.
        since: when it became the owner.
        token: random; differs between two ownerships of one process.
    """

    host: str
    machine: str
    pid: int
    born: str | None
    since: str
    token: str

    @classmethod
    def of_this_process(cls) -> Self:
        """This process, as an owner from now on."""
        pid = os.getpid()
        since, token = time.strftime("%Y-%m-%d %H:%M:%S"), secrets.token_hex(8)
        return cls(socket.gethostname(), _machine(), pid, _born(pid), since, token)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class OwnedError(ValueError):
    """Another process owns the file; `owner` is None if it has not yet written who it is."""

    def __init__(self, file: Path, owner: Owner | None) -> None:
        who = owner or "a process that has just started"
        super().__init__(f"{file.parent} is being written by {who}; wait for it or stop it (its lock: {file})")
        self.owner = owner


class Ownership:
    """The ownership of a file by this process, which ends at the end of a `with` block."""

    def __init__(self, file: Path, owner: Owner) -> None:
        self.file, self.owner = file, owner
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"owner of {file.parent.name}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Ends the ownership."""
        self._ended.set()
        self._thread.join()
        found = _read(self.file)
        if found is not None and found.token == self.owner.token:
            self.file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                found = _read(self.file)
                if found is not None and found.token != self.owner.token:
                    # Only after this process, or its file system, stood still: two writers would mix their files.
                    print(f"error: {self.file.parent} was taken over by {found}", file=sys.stderr, flush=True)
                    os._exit(1)
                os.utime(self.file)
            except OSError:  # the folder is gone, or its server does not answer
                continue


def own(file: Path) -> Ownership:
    """Makes this process the owner of a file's folder, or of what the file is named after.

    Raises:
        OwnedError: if another process owns it.
        OSError: if the file cannot be written.
    """
    me = Owner.of_this_process()
    while True:
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            if _is_held(file):
                raise OwnedError(file, _holder(file)) from None
            _remove_stale(file)
            continue
        try:
            with writing(file), os.fdopen(descriptor, "w") as stream:
                stream.write(json.dumps(asdict(me)) + "\n")
        except OSError:
            file.unlink(missing_ok=True)  # an empty one would hold the folder for a while
            raise
        return Ownership(file, me)


def require_free(file: Path) -> None:
    """Checks that no other process owns a file; writes nothing.

    Raises:
        OwnedError: if one does.
    """
    if _is_held(file):
        raise OwnedError(file, _holder(file))


def _read(file: Path) -> Owner | None:
    """The owner; None if there is no file or it is not yet written."""
    try:
        return Owner(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _holder(file: Path) -> Owner | None:
    """The owner of a file that is held; one that has just created it has a second to write who it is."""
    for _ in range(20):
        if (found := _read(file)) is not None:
            return found
        time.sleep(0.05)
    return None


def has_ended(pid: int, born: str | None) -> bool:
    """Whether a process of this machine has ended; `born` is that of its `Owner`. False if unknown."""
    return _lives(pid, born) is False


def _lives(pid: int, born: str | None) -> bool | None:
    """Whether a process of this machine lives; None if it is unknown whether it is another one with its number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists, and is another user's
        pass
    found = _born(pid)
    return None if found is None or born is None else found == born


def _is_held(file: Path) -> bool:
    owner = _read(file)
    if owner is not None and owner.machine == _machine() and (lives := _lives(owner.pid, owner.born)) is not None:
        return lives
    return _beats(file)


def _beats(file: Path) -> bool:
    """Whether a file was touched in the last `STALE_S`; an old one is watched, since two clocks may differ."""
    touched = _touched(file)
    if touched is None or time.time() - touched <= STALE_S:
        return touched is not None
    for _ in range(10):
        time.sleep(HEARTBEAT_S / 4)
        if _touched(file) != touched:
            return _touched(file) is not None
    return False


def _touched(file: Path) -> float | None:
    try:
        with file.open(encoding="utf-8") as stream:  # opened, since NFS caches what `stat` of a path returns
            return os.fstat(stream.fileno()).st_mtime
    except OSError:
        return None


def _remove_stale(file: Path) -> None:
    """Removes the file of a process that is gone; only one process at a time may do so."""
    guard = file.with_name(f"{file.name}.takeover")
    try:
        os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        touched = _touched(guard)
        if touched is not None and time.time() - touched > STALE_S:
            guard.unlink(missing_ok=True)
        time.sleep(0.05)
        return
    try:
        if not _is_held(file):  # another process may have taken it over in the meantime
            file.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """When a process started, in units of this machine; empty if it has ended but is not reaped, None if unknown."""
    if Path("/proc/self/stat").exists():
        try:
            # The name, in brackets, may hold spaces.
            state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return None
        return "" if state in "ZX" else fields[18]
    same = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}  # for every process that asks
    command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    found = subprocess.run(command, env=same, capture_output=True, text=True).stdout.split()
    return "" if not found or found[0].startswith("Z") else " ".join(found[1:])

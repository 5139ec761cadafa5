"""metrics.jsonl: one JSON object a line, the only source of every figure."""

import json
import os
import sys
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends whole lines, and cuts the file back when a run resumes from an earlier step.

    A line that cannot be written (full disk) is kept and written with a later one; it is never written in part.
    Only rank 0 writes; that is the callers' care.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._warned = False

    def append(self, record: dict[str, Any]) -> None:
        """Adds one line; says so once if it has to wait for space."""
        self._waiting += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                self._warned = True
                print(f"{self.path} cannot be written now ({error}); its lines are kept for later", file=sys.stderr)

    def sync(self) -> None:
        """Writes what waits and makes it durable: a checkpoint must not be newer than the lines before it.

        Raises:
            OSError: if that is impossible.
        """
        self._write(durable=True)

    def size(self) -> int:
        """Bytes of the file, with the lines that still wait."""
        written = self.path.stat().st_size if self.path.is_file() else 0
        return written + len(self._waiting)

    def read(self) -> list[dict[str, Any]]:
        """All records; a last line torn by a kill is left out.

        Raises:
            ValueError: if any other line is damaged.
        """
        return [record for _, record in self._lines()]

    def cut_after(self, step: int) -> int:
        """Drops the records of later steps, and a torn last line; returns how many lines went.

        A resumed run writes them again. Lines that stay keep their bytes.

        Raises:
            ValueError: if a line in the middle is damaged.
        """
        self._waiting = b""
        if not self.path.is_file():
            return 0
        kept = b"".join(line for line, record in self._lines() if record.get("step", 0) <= step)
        content = self.path.read_bytes()
        if kept == content:
            return 0
        partial = self.path.with_name(f"{self.path.name}.tmp")
        partial.write_bytes(kept)
        partial.replace(self.path)
        return len(content.splitlines()) - len(kept.splitlines())

    def cut_to(self, size: int) -> bool:
        """Cuts the file to its first `size` bytes; False, and nothing done, where no line ends there."""
        self._waiting = b""
        with self.path.open("a+b") as file:
            if size > os.fstat(file.fileno()).st_size:
                return False
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":
                return False
            file.truncate(size)
        return True

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole, _, _torn = content.rpartition(b"\n")
        found = []
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self.path}:{number} is damaged: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{self.path}:{number} is damaged: not an object")
            found.append((line + b"\n", record))
        return found

    def _write(self, durable: bool = False) -> None:
        """Writes the waiting lines, all or none."""
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            before = os.fstat(handle).st_size
            left = memoryview(self._waiting)
            try:
                while left:
                    left = left[os.write(handle, left) :]
            except OSError:
                os.ftruncate(handle, before)
                raise
            self._waiting = b""
            if durable:
                os.fsync(handle)
        finally:
            os.close(handle)

"""metrics.jsonl: one JSON object per line, the only source of every figure."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from callbacks.files.atomic import write_atomic


class MetricsFile:
    """Appends complete lines, and truncates the file when a run resumes from an earlier step.

    A line that cannot be written (full disk) waits and is written with a later one, never partially. Callers make sure
    that only rank 0 writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._warned = False

    def append(self, record: dict[str, Any]) -> None:
        """Appends a line; prints a warning the first time that one has to wait."""
        self._waiting += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                self._warned = True
                print(f"{self.path} cannot be written now ({error}); lines are written later", file=sys.stderr)

    def sync(self) -> None:
        """Writes waiting lines and syncs the file: a checkpoint must not be newer than the lines before it.

        Raises:
            OSError: if that fails.
        """
        self._write(durable=True)

    def size(self) -> int:
        """Bytes of the file including waiting lines."""
        written = self.path.stat().st_size if self.path.is_file() else 0
        return written + len(self._waiting)

    def read(self) -> list[dict[str, Any]]:
        """All records, without an incomplete last line.

        Raises:
            ValueError: if any other line is damaged.
        """
        return [record for _, record in self._lines()]

    def cut_after(self, step: int) -> int:
        """Removes the records of later steps, and an incomplete last line; returns the number of removed lines.

        A resumed run writes them again. Other lines keep their bytes.

        Raises:
            ValueError: if a line in the middle is damaged.
        """
        self._waiting = b""
        if not self.path.is_file():
            return 0
        earlier = b"".join(line for line, record in self._lines() if record.get("step", 0) <= step)
        content = self.path.read_bytes()
        if earlier == content:
            return 0
        write_atomic(self.path, earlier)
        return len(content.splitlines()) - len(earlier.splitlines())

    def cut_to(self, size: int) -> bool:
        """Truncates the file to `size` bytes; returns False, unchanged, if no line ends there."""
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
        complete, _, _ = content.rpartition(b"\n")
        lines = []
        for number, line in enumerate(complete.split(b"\n") if complete else [], start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self.path}:{number} is damaged: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{self.path}:{number} is damaged: not an object")
            lines.append((line + b"\n", record))
        return lines

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

"""metrics.jsonl: one JSON object per line, the only source of every figure."""

import json
import os
from pathlib import Path
from typing import Any

from callbacks.files.appended_file import AppendedFile
from callbacks.files.atomic import write_atomic
from callbacks.files.line_digests import check, signed

# Bytes of lines that may wait for space on the disk, of some 50,000 lines.
WAITING = 64 * 2**20


class MetricsFile:
    """Appends complete lines, and truncates the file when a run resumes from an earlier step.

    A line that cannot be written (full disk) waits and is written with a later one, never partially. Callers make sure
    that only rank 0 writes, and `sync` at the end of the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Lines that a resumed run will write again, until its next checkpoint.
        self.replaced = path.with_name(f"{path.stem}.replaced{path.suffix}")
        self._file = AppendedFile(path, "lines", WAITING)
        self._tip: str | None = None  # digest of the last line; None until the file is read

    def append(self, record: dict[str, Any]) -> None:
        """Appends a line; prints a warning the first time that one has to wait.

        Raises:
            OSError: if more lines wait than may.
        """
        body = json.dumps(record, allow_nan=False).encode()
        line, self._tip = signed(self._last(), body)
        self._file.add(line + b"\n")
        self._file.try_to_write()

    def sync(self) -> None:
        """Writes waiting lines and syncs the file: a checkpoint must not be newer than the lines before it.

        Raises:
            OSError: if that fails, naming the file.
        """
        self._file.write(durable=True)

    def size(self) -> int:
        """Bytes of the file including waiting lines."""
        return self._file.size()

    def tip(self, size: int | None = None) -> str:
        """Digest of the last line, or of the last in the first `size` bytes; it covers all lines before.

        Raises:
            ValueError: if a line is damaged.
        """
        lines = self._lines(size)
        return lines[-1][2] if lines else ""

    def end(self) -> tuple[int, str]:
        """Size and last digest, including waiting lines."""
        tip = self._last()
        return self.size(), tip

    def read(self) -> list[dict[str, Any]]:
        """All records, without an incomplete last line.

        Raises:
            ValueError: if any other line is damaged.
        """
        return [record for _, record, _ in self._lines()]

    def cut_after(self, step: int) -> int:
        """Sets aside the records of later steps, and an incomplete last line; returns the number of removed lines.

        A resumed run writes them again. Other lines keep their bytes.

        Raises:
            ValueError: if a line in the middle is damaged.
        """
        self._file.forget()
        self._tip = None
        if not self.path.is_file():
            return 0
        earlier = b"".join(line for line, record, _ in self._lines() if record.get("step", 0) <= step)
        content = self.path.read_bytes()
        if earlier == content:
            return 0
        self._set_aside(content[len(earlier) :] if content.startswith(earlier) else content)
        write_atomic(self.path, earlier)
        return len(content.splitlines()) - len(earlier.splitlines())

    def cut_to(self, size: int) -> bool:
        """Sets aside what follows `size` bytes; returns False, unchanged, if no line ends there."""
        self._file.forget()
        self._tip = None
        with self.path.open("a+b") as file:
            if size > os.fstat(file.fileno()).st_size:
                return False
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":
                return False
            file.seek(size)
            self._set_aside(file.read())
            file.truncate(size)
        return True

    def _last(self) -> str:
        """The last digest, including waiting lines; an incomplete last line of a former process is to be cut."""
        if self._tip is None:
            self._file.cut_torn_line()
            self._tip = self.tip()
        return self._tip

    def _set_aside(self, later: bytes) -> None:
        """Keeps what is cut in a file of its own; of several cuts before a checkpoint, the first."""
        if later and not self.replaced.exists():
            write_atomic(self.replaced, later)

    def _lines(self, size: int | None = None) -> list[tuple[bytes, dict[str, Any], str]]:
        """Each line, its record and its digest."""
        content = self.path.read_bytes()[:size] if self.path.is_file() else b""
        complete, _, _ = content.rpartition(b"\n")
        lines = []
        tip, has_digests = "", False
        for number, line in enumerate(complete.split(b"\n") if complete else [], start=1):
            try:
                body, tip, has_digests = check(tip, has_digests, line)
                record = json.loads(body)
            except ValueError as error:
                raise ValueError(f"{self.path}:{number} is damaged: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{self.path}:{number} is damaged: not an object")
            lines.append((line + b"\n", record, tip))
        return lines

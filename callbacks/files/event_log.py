"""events.log: every skip, fallback and stop of a run, one per line."""

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from callbacks.files.appended_file import AppendedFile
from callbacks.files.disk import tell

# Bytes of events that may wait for space on the disk.
WAITING = 2**20


class EventLog:
    """Appends `time kind text` lines for everything that changes the course of a run.

    An event that cannot be written (full disk) is printed, and written with a later one or by `catch_up`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = AppendedFile(path, "events", WAITING, drops=True)
        self._begun = False

    def write(self, kind: str, text: str) -> None:
        """Appends an event; line breaks in `text` become spaces.

        Raises:
            ValueError: if `kind` is not one word.
        """
        if kind.split() != [kind]:
            raise ValueError(f"kind={kind!r}: expected one word")
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {kind} {' '.join(text.split())}\n"
        if not self._begun:
            self._begun = True
            with suppress(OSError):  # told by the write
                self._lines.cut_torn_line()
        self._lines.add(line.encode(errors="backslashreplace"))
        if not self._lines.try_to_write():  # a full disk must not end the run
            tell(line.rstrip())

    def catch_up(self) -> None:
        """Writes events that wait, if that is possible now."""
        self._lines.try_to_write()

    def read(self) -> list[tuple[str, str, str]]:
        """Time, kind and text of each complete line."""
        if not self.path.is_file():
            return []
        complete = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        parts = [line.split(" ", 2) for line in complete]
        return [(part[0], part[1], part[2]) for part in parts if len(part) == 3]

    def counts(self) -> dict[str, int]:
        """Number of events of each kind, in order of first occurrence."""
        return dict(Counter(kind for _, kind, _ in self.read()))

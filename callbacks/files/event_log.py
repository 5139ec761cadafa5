"""events.log: every skip, fallback and stop of a run, one per line."""

import sys
import time
from collections import Counter
from pathlib import Path


class EventLog:
    """Appends `time kind text` lines for everything that changes the course of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, text: str) -> None:
        """Appends an event; line breaks in `text` become spaces.

        Raises:
            ValueError: if `kind` is not one word.
        """
        if kind.split() != [kind]:
            raise ValueError(f"kind={kind!r}: expected one word")
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {kind} {' '.join(text.split())}\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:  # a full disk must not end the run
            print(f"{self.path} cannot be written ({error}): {line}", end="", file=sys.stderr)

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

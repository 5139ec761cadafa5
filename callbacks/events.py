"""events.log: every skip, fall-back and stop of a run, one line each."""

import time
from pathlib import Path


class EventLog:
    """Appends `time kind text` lines; nothing that changes a run happens in silence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, text: str) -> None:
        """Adds one event."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{stamp} {kind} {' '.join(text.split())}\n")

    def counts(self) -> dict[str, int]:
        """How many events of each kind."""
        totals: dict[str, int] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                kind = line.split(" ")[1]
                totals[kind] = totals.get(kind, 0) + 1
        return totals

"""metrics.jsonl: one JSON object a line, the only source of every figure."""

import json
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends records, and cuts the file back when a run resumes from an earlier step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Adds one line in a single write."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def read(self) -> list[dict[str, Any]]:
        """All whole records; a last line torn by a kill is left out."""
        if not self.path.is_file():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def cut_after(self, step: int) -> None:
        """Drops the records of later steps: a resumed run writes them again."""
        kept = [record for record in self.read() if record["step"] <= step]
        partial = self.path.with_name(f"{self.path.name}.tmp")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(self.path)

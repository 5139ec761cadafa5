"""Memory that this process may still take, in a container as well."""

from collections.abc import Iterator
from pathlib import Path

from callbacks.files.cgroups import groups, words

# Files of a memory controller: limit, use, statistics, and the line of these with cached files that can be dropped.
V2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that neither this machine nor a limit on this process's group withholds; None if unknown."""
    found = [*_machine(root), *_groups(root)]
    return max(0, min(found)) if found else None


def _machine(root: Path) -> Iterator[int]:
    fields = _fields(root / "proc/meminfo")
    if "MemAvailable:" in fields:
        yield fields["MemAvailable:"] * 1024


def _groups(root: Path) -> Iterator[int]:
    """What each limit on this process leaves, of its own group and of those above."""
    for folder, is_v2 in groups(root, "memory"):
        limit, use, statistics, droppable = V2 if is_v2 else V1
        found = words(folder, limit, use)
        if found is not None and found[0] != "max":
            yield int(found[0]) - int(found[1]) + _fields(folder / statistics).get(droppable, 0)


def _fields(file: Path) -> dict[str, int]:
    """The number after each name."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}

"""Memory that this process may still take, in a container as well."""

from collections.abc import Iterator
from pathlib import Path

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
    try:
        entries = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for entry in entries:
        _, controllers, name = entry.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", V2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", V1
        else:
            continue
        folder = mount / name.lstrip("/")
        # In a container, the group is mounted as the root of the tree.
        for place in dict.fromkeys((folder, *folder.parents, mount)):
            if place.is_relative_to(mount):
                yield from _left(place, *names)


def _left(place: Path, limit: str, use: str, statistics: str, droppable: str) -> Iterator[int]:
    try:
        most, used = ((place / name).read_text(encoding="ascii").strip() for name in (limit, use))
    except (OSError, ValueError):
        return
    if most != "max":
        yield int(most) - int(used) + _fields(place / statistics).get(droppable, 0)


def _fields(file: Path) -> dict[str, int]:
    """The number after each name."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}

"""Control groups of this process: a container's limits on memory and processor time."""

from collections.abc import Iterator
from pathlib import Path


def groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of a controller's groups, this process's own and those above it, and whether they are of version 2."""
    try:
        entries = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for entry in entries:
        _, controllers, name = entry.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = mount / name.lstrip("/")
        # In a container, the group is mounted as the root of the tree.
        for place in dict.fromkeys((folder, *folder.parents, mount)):
            if place.is_relative_to(mount):
                yield place, controllers == ""


def words(folder: Path, *names: str) -> list[str] | None:
    """The words of some files of a group; None if one cannot be read."""
    try:
        return [word for name in names for word in (folder / name).read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return None

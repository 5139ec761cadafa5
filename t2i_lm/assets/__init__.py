"""Where the files that a config names lie; the demo's own trained weights lie here (`README.md` says how made)."""

from importlib.resources import files
from pathlib import Path

from t2i_lm.storage import hub

PREFIX = "asset:"


def resolve(path: str) -> Path:
    """A path from a config: `asset:NAME` is shipped, `hub:...` is fetched, anything else is taken as it stands.

    Raises:
        ValueError: if the asset is not shipped, naming those that are, or the hub's file is out of reach.
    """
    if path.startswith(hub.PREFIX):
        return hub.fetch(path)
    if not path.startswith(PREFIX):
        return Path(path)
    folder = Path(str(files(__name__)))
    asset = folder / path.removeprefix(PREFIX)
    if not asset.exists():
        known = sorted(item.name for item in folder.iterdir() if not item.name.startswith("_"))
        raise ValueError(f"{path}: not shipped; known are {', '.join(known)}")
    return asset


def find(path: str) -> Path | None:
    """`resolve` without the network; None where nothing is there."""
    found = hub.cached(path) if path.startswith(hub.PREFIX) else resolve(path)
    return found if found is not None and found.exists() else None

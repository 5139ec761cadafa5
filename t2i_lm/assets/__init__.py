"""Paths of a config as files; the demo's trained weights and texts lie in this folder (README.md: their origin)."""

from importlib.resources import files
from pathlib import Path

from t2i_lm.config.sections import ASSET
from t2i_lm.storage import hub

PREFIX = ASSET


def resolve(path: str) -> Path:
    """The file of a path: `asset:NAME` is shipped, `hf://...` is fetched, any other is a local path.

    Raises:
        ValueError: if there is no such asset, naming those that exist, or the hub's file is out of reach.
    """
    if hub.is_hub(path):
        return hub.fetch(path)
    if not path.startswith(PREFIX):
        return Path(path)
    folder = Path(str(files(__name__)))
    name = path.removeprefix(PREFIX)
    asset = folder / name
    if not asset.exists():
        above = folder / name.rpartition("/")[0]
        items = (above if above.is_dir() else folder).iterdir()
        known = sorted(item.relative_to(folder).as_posix() for item in items if not item.name.startswith("_"))
        raise ValueError(f"{path}: expected one of {', '.join(f'{PREFIX}{name}' for name in known)}")
    return asset


def find(path: str) -> Path | None:
    """As `resolve`, without the network; None where there is no file."""
    file = hub.cached(path) if hub.is_hub(path) else resolve(path)
    return file if file is not None and file.exists() else None

"""The demo's own trained weights; `README.md` here says how they were made."""

from importlib.resources import files
from pathlib import Path

PREFIX = "asset:"


def resolve(path: str) -> Path:
    """A path from a config: `asset:NAME` is a shipped file or folder, anything else is taken as it stands.

    Raises:
        ValueError: if the asset is not shipped, naming those that are.
    """
    if not path.startswith(PREFIX):
        return Path(path)
    folder = Path(str(files(__name__)))
    asset = folder / path.removeprefix(PREFIX)
    if not asset.exists():
        known = sorted(item.name for item in folder.iterdir() if not item.name.startswith("_"))
        raise ValueError(f"{path}: not shipped; known are {', '.join(known)}")
    return asset

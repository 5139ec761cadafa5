"""Paths of a config as files; the demo's trained weights and texts lie in this folder (README.md: their origin)."""

from importlib.resources import files
from pathlib import Path

from t2i_lm.config.sections import ASSET
from t2i_lm.storage import hub
from t2i_lm.storage.cards import CARD, require_intact

PREFIX = ASSET
_FOLDER = Path(str(files(__name__)))


def resolve(path: str, key: str) -> Path:
    """The file of a path: `asset:NAME` is shipped, `hf://...` is fetched, any other is a local path.

    Files that a card.json beside them holds hashes of are verified.

    Args:
        path: of a file or folder, which may be absent where it is neither shipped nor fetched.
        key: config key or option that holds it.

    Raises:
        ValueError: if there is no such asset, naming those that exist, the hub's file is out of reach, or a file is
            damaged.
    """
    if path.startswith(PREFIX):
        asset = _asset(path)
        if not asset.exists():
            raise ValueError(f"{key}={path}: expected one of {', '.join(_known(asset))}")
        require_intact(asset, _remedy(asset.relative_to(_FOLDER)))
        return asset
    try:
        file = hub.fetch(path) if hub.is_hub(path) else Path(path)
    except ValueError as error:
        raise ValueError(f"{key}={error}") from error
    require_intact(file)
    return file


def find(path: str) -> Path | None:
    """As `resolve`, without the network; None where there is no file."""
    if hub.is_hub(path):
        return hub.cached(path)
    if not (_asset(path) if path.startswith(PREFIX) else Path(path)).exists():
        return None
    return resolve(path, "path")


def _asset(path: str) -> Path:
    return _FOLDER / path.removeprefix(PREFIX)


def _known(absent: Path) -> list[str]:
    """What is shipped in the folder of an absent file, or of all."""
    items = (absent.parent if absent.parent.is_dir() else _FOLDER).iterdir()
    shown = (item for item in items if not item.name.startswith("_") and item.name != CARD)
    return sorted(f"{PREFIX}{item.relative_to(_FOLDER).as_posix()}" for item in shown)


def _remedy(name: Path) -> str:
    """The command that restores a shipped folder, by the name of it or of its file."""
    package = Path(__file__).parent
    if (package.parents[1] / ".git").exists():
        return f"restore it by `git -C {package} checkout -- {name.parts[0]}`"
    return "restore it by `pip install --force-reinstall --no-deps t2i_lm`"

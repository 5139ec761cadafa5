"""card.json of exported weights: what was measured on them, and the sha256 of each file, verified before it is used."""

import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from t2i_lm.storage.hashing import known_sha256
from t2i_lm.storage.sealed import read_sealed, sealed
from t2i_lm.storage.writing import write_atomic

CARD = "card.json"
# Entry of a card: sha256 by name, below its folder.
FILES = "files"
REMEDY = (
    "copy it again, or export again (python -m t2i_lm.export RUN --out FOLDER); without its card.json the folder is "
    "used as it is"
)
# Entries of every export, also of versions that recorded no hashes.
_OWN = {"experiment", "task"}
# Read together with a weights file.
_BESIDE = "config.json"


def write_card(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Writes card.json with hashes of all files below a folder; returns its content."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / CARD)
    hashes = {file.relative_to(folder).as_posix(): known_sha256(file) for file in files}
    card = sealed({**content, FILES: hashes})
    write_atomic(folder / CARD, json.dumps(card, indent=2) + "\n")
    return card


def require_intact(path: Path, remedy: str = REMEDY) -> None:
    """Verifies the files of a folder, or a file of it and the config beside, if a card.json holds their hashes.

    A file is hashed once per process, while its size and times stay.

    Raises:
        ValueError: naming a file that is damaged or missing, or the card, and the remedy.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / CARD).is_file():
        return
    try:
        card = read_sealed(folder / CARD, remedy)
        hashes = card.get(FILES)
        if not isinstance(hashes, dict):
            if card.keys() >= _OWN:
                _note_unverified(folder)
            return
        names = list(hashes) if path.is_dir() else [name for name in (path.name, _BESIDE) if name in hashes]
        for name in names:
            if (folder / name).is_file() or path.is_dir() or name == path.name:
                _require_same(folder / name, str(hashes[name]), remedy)
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}; {remedy}") from error


def _require_same(file: Path, sha256: str, remedy: str) -> None:
    if not file.is_file():
        raise ValueError(f"{file} is missing, which {CARD} names; {remedy}")
    if known_sha256(file) != sha256:
        raise ValueError(f"{file} is damaged: its sha256 differs from {CARD}; {remedy}")


@cache
def _note_unverified(folder: Path) -> None:
    print(f"note: {folder / CARD} is of an older version, without hashes: its files are not verified", file=sys.stderr)

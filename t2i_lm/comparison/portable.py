"""Text of a run's files without absolute paths, which would name the machine and its user."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2i_lm.config.key_groups import PATH_KEYS

# A path of two or more parts inside a text: neither an address of the web nor a closing tag.
_PATH = re.compile(r"(?<![\w./<~-])/(?!/)[^\s/:;,'\"()<>|\[\]]+(?:/[^\s/:;,'\"()<>|\[\]]+)+/?")
# Text of models and users, which is no place.
WORDS = ("completions", "prompts")
SHORTEST = 2  # parts of a folder that says nothing about where others lie: / and /home


def portable(value: Any, starts: Sequence[Path]) -> Any:
    """A JSON value whose texts have paths relative to the first of `starts` that they lie in, else their last name."""
    if isinstance(value, Mapping):
        own = {key: one if key in WORDS else portable(one, starts) for key, one in value.items()}
        return {portable_text(key, starts) if isinstance(key, str) else key: one for key, one in own.items()}
    if isinstance(value, list | tuple):
        return [portable(one, starts) for one in value]
    return portable_text(value, starts) if isinstance(value, str) else value


def portable_text(text: str, starts: Sequence[Path]) -> str:
    """As `portable`, of one text."""
    text = text.replace("file:///", "/")
    if os.path.isabs(text) and "\n" not in text and not re.search(r"\s/", text):
        return _relative(text, starts)
    for start in starts:
        if len(start.parts) > SHORTEST:  # also where a name in it has spaces
            text = text.replace(f"{start}/", "")
    return _PATH.sub(lambda found: _relative(found[0], starts), text)


def portable_config(values: Mapping[str, Any], starts: Sequence[Path]) -> dict[str, Any]:
    """Values of a config by dotted key with portable paths: of keys of paths, and in those that name a plug-in."""
    return {
        key: portable_text(value, starts) if isinstance(value, str) and (key in PATH_KEYS or ":" in value) else value
        for key, value in values.items()
    }


def _relative(path: str, starts: Sequence[Path]) -> str:
    for start in starts:
        if len(start.parts) > SHORTEST and Path(path).is_relative_to(start):
            return str(Path(path).relative_to(start))
    return Path(path).name

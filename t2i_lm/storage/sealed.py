"""JSON objects that hold a digest of their other entries, so that damage is named before they are used."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIGEST = "digest"


def digest_of(content: Mapping[str, Any]) -> str:
    """Digest of the entries of an object but for its own, whatever their order and layout in a file."""
    body = {key: value for key, value in content.items() if key != DIGEST}
    plain = json.loads(json.dumps(body, default=str))  # keys become strings
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """An object with the digest of its entries."""
    return {**content, DIGEST: digest_of(content)}


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a file, with its digest, which those of older versions lack.

    Raises:
        ValueError: naming the file and the remedy, if it is no JSON object, or its digest differs.
        OSError: if it cannot be opened.
    """
    return opened(path.read_bytes(), str(path), remedy)


def opened(text: bytes, place: str, remedy: str) -> dict[str, Any]:
    """The object in the text of a file at `place`, as `read_sealed`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is damaged: {' '.join(str(error).split())}; {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{place} is damaged: not a JSON object; {remedy}")
    require_digest(content, place, remedy)
    return content


def require_digest(content: Mapping[str, Any], place: str | Path, remedy: str) -> None:
    """Checks the digest of an object, where it has one.

    Raises:
        ValueError: naming place and remedy, if it differs.
    """
    if DIGEST in content and content[DIGEST] != digest_of(content):
        raise ValueError(f"{place} is damaged: its digest differs from its entries; {remedy}")

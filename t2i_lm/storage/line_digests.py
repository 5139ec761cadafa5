"""Digests of lines in metrics.jsonl, as `callbacks.files.line_digests` writes and checks them; without Lightning.

A line is a JSON object whose last field is its digest, 16 hexadecimal digits of sha256(digest before, line without it).
Lines of older versions have none; they may only come first, and the first digest after them covers them too.
"""

import hashlib
import re

_FIELD = re.compile(rb', "digest": "([0-9a-f]{16})"\}$')


def signed(tip: str, body: bytes) -> tuple[bytes, str]:
    """A line with its digest, and that digest, after a line with the digest `tip`."""
    digest = _digest(tip, body)
    return body[:-1] + f', "digest": "{digest}"}}'.encode(), digest


def check(tip: str, has_digests: bool, line: bytes) -> tuple[bytes, str, bool]:
    """A line without its digest, the digest up to it, and whether lines after it must have one.

    Raises:
        ValueError: if the line is not the one that was written after the line before.
    """
    found = _FIELD.search(line)
    body = line if found is None else line[: found.start()] + b"}"
    digest = _digest(tip, body)
    if found is None and has_digests:
        raise ValueError("it has no digest, which the lines before it have")
    if found is not None and found[1].decode() != digest:
        raise ValueError("its digest does not follow from it and the lines before: one of them was changed or removed")
    return body, digest, found is not None


def _digest(tip: str, body: bytes) -> str:
    return hashlib.sha256(tip.encode() + body).hexdigest()[:16]

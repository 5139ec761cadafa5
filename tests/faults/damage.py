"""Seeded damage of the bytes of a file."""

import os
import random
from collections.abc import Callable

# Damages of each kind of file.
COUNT = int(os.environ.get("T2I_LM_FAULTS", "20"))


def flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def zero(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    length = min(len(content) - start, draw.randint(1, 4096))
    return content[:start] + bytes(length) + content[start + length :]


def double(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.randint(1, 200))
    return content[:end] + content[start:end] + content[end:]


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, cut, zero, double)


def damage(content: bytes, draw: random.Random) -> bytes:
    """A damage of a random kind at a random place; it may change nothing."""
    return draw.choice(DAMAGES)(content, draw)

"""Random streams."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A random stream of its own for each purpose, so that draws of one never shift another's."""
    digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


@contextmanager
def seeded(source: int | torch.Generator) -> Iterator[None]:
    """Torch's global stream of the CPU begins at a seed, and afterwards is as before: for code that takes no generator.

    Args:
        source: the seed, or the stream that draws it. No other device's stream is touched.
    """
    seed = source if isinstance(source, int) else int(torch.randint(2**31, (), generator=source))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs', too
        yield

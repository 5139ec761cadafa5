"""Random generators."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """An independent generator per purpose, so that samples of one never shift another's."""
    digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


@contextmanager
def seeded(source: int | torch.Generator) -> Iterator[None]:
    """Temporarily seeds torch's global CPU generator and restores it on exit, for code that takes no generator.

    Args:
        source: the seed, or a generator to sample it from. Generators of other devices are untouched.
    """
    seed = source if isinstance(source, int) else int(torch.randint(2**31, (), generator=source))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs'
        yield

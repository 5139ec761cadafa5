"""Random streams."""

import hashlib

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A random stream of its own for each purpose, so that draws of one never shift another's."""
    digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)

"""Randomness addressed by name.

Every draw in a federation has a path, such as ``("client", 3, "round", 17, "batches")``. The numbers that a path
gives depend on the federation's seed and on the path alone: not on the order in which clients run, on what was drawn
before, or on how many processes share the work.
"""

from __future__ import annotations

import hashlib

import torch

PathPart = str | int


def seed_of(seed: int, *path: PathPart) -> int:
    """A 63-bit seed for one named draw.

    Args:
        seed: The federation's seed.
        path: The name of the draw; strings and integers, told apart (``1`` and ``"1"`` are different names).

    Returns:
        A non-negative integer below 2**63, the same on every machine and in every process.

    Raises:
        TypeError: If a part of the path is neither a string nor an integer.

    Example:
        >>> seed_of(0, "cohort", 3) == seed_of(0, "cohort", 3)
        True
        >>> seed_of(0, "cohort", 3) == seed_of(0, "cohort", "3")
        False
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *path):
        if isinstance(part, bool) or not isinstance(part, (str, int)):
            raise TypeError(
                f"`path` of a random stream takes strings and integers, got {part!r} of type {type(part).__name__}."
            )
        kind = b"s" if isinstance(part, str) else b"i"
        text = str(part).encode()
        digest.update(kind + len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def stream(seed: int, *path: PathPart) -> torch.Generator:
    """A CPU generator for one named draw.

    Args:
        seed: The federation's seed.
        path: The name of the draw, as in :func:`seed_of`.

    Returns:
        A fresh ``torch.Generator``; two calls with the same arguments give generators in the same state.

    Example:
        >>> a, b = (torch.randperm(5, generator=stream(7, "client", 2)) for _ in range(2))
        >>> bool((a == b).all())
        True
    """
    return torch.Generator().manual_seed(seed_of(seed, *path))

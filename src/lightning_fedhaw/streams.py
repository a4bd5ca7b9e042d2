"""Random streams that are addressed by name.

Every draw in a federation has a path, such as ``("client", 3, "round", 17, "batches")``. The numbers of a path depend
only on the federation's seed and on the path. They do not depend on the order in which clients train, on earlier draws,
or on the number of processes.
"""

from __future__ import annotations

import hashlib

import torch

PathPart = str | int


def seed_of(seed: int, *path: PathPart) -> int:
    """Return a 63-bit seed for one named draw.

    Args:
        seed: The federation's seed.
        path: The name of the draw, as strings and integers; ``1`` and ``"1"`` are different names.

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
    name = b""
    for entry in (seed, *path):
        if isinstance(entry, bool) or not isinstance(entry, (str, int)):
            raise TypeError(
                f"`path` of a random stream takes strings and integers, got {entry!r} of type {type(entry).__name__}."
            )
        # Type and length first, so that no two paths give the same bytes: ("ab", "c") and ("a", "bc") differ.
        kind = b"s" if isinstance(entry, str) else b"i"
        text = str(entry).encode()
        name += kind + len(text).to_bytes(4, "little") + text
    digest = hashlib.blake2b(name, digest_size=8).digest()
    # One bit less than the digest, so that the seed is not negative as a signed 64-bit integer.
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, *path: PathPart) -> torch.Generator:
    """Return a random generator on the CPU for one named draw.

    Args:
        seed: The federation's seed.
        path: The name of the draw, as in :func:`seed_of`.

    Returns:
        A new ``torch.Generator``; two calls with the same arguments return generators in the same state.

    Example:
        >>> first = torch.randperm(5, generator=stream(7, "client", 2))
        >>> second = torch.randperm(5, generator=stream(7, "client", 2))
        >>> torch.equal(first, second)
        True
    """
    return torch.Generator().manual_seed(seed_of(seed, *path))

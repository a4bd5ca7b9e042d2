"""Splits that the user determines: by a key of each sample, or by lists of indices.

Shapes: K clients.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
import torch

from lightning_fedhaw import arguments
from lightning_fedhaw.data.partitioners.base import Partitioner
from lightning_fedhaw.data.partitioners.partition import Integers, Partition


class NaturalIdPartitioner(Partitioner):
    """One client for each distinct value of a key, such as the speaker or the hospital that a sample comes from.

    Args:
        keys: The key of every sample ``[samples]``: a sequence, array, tensor or column of hashable values.

    Attributes:
        names: The key of each client, in the order of first appearance.

    Raises:
        TypeError: If a key cannot be hashed.
        ValueError: If there are no keys, they are a text, or one is missing (None or NaN).
    """

    def __init__(self, keys: Iterable[Hashable]) -> None:
        allowed = "the column of keys itself, one entry per sample"
        if isinstance(keys, (str, bytes)):
            raise arguments.invalid("keys", allowed, keys)
        try:
            values = arguments.plain_list(keys)
        except TypeError:  # not iterable
            raise arguments.invalid("keys", allowed, keys) from None
        if not values:
            raise ValueError("`keys` must have one entry per sample, got none.")
        client_of: dict[Hashable, int] = {}
        owners = []
        for sample, key in enumerate(values):
            if not isinstance(key, Hashable):
                raise TypeError(
                    f"`keys` must be one number, string or other hashable value per sample, got"
                    f" {type(key).__name__} for sample {sample}."
                )
            # NaN is the value that differs from itself.
            if key is None or key != key:
                raise ValueError(
                    f"`keys` must have a value for every sample, got {key} for sample {sample}; leave such samples out"
                    " or give them a key of their own."
                )
            owners.append(client_of.setdefault(key, len(client_of)))
        self.names: tuple[Hashable, ...] = tuple(client_of)
        self._owners = np.array(owners, dtype=np.int64)  # [samples]

    @property
    def num_clients(self) -> int:
        """The number of distinct keys."""
        return len(self.names)

    def split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """Give each sample to the client of its key; the seed changes nothing."""
        if len(self._owners) != len(labels):
            raise ValueError(f"`keys` must have one entry per sample ({len(labels)}), got {len(self._owners)}.")
        return Partition.from_owners(self._owners, num_clients)


class IndexPartitioner(Partitioner):
    """A split into given lists of indices; samples in none of them are dropped and counted.

    Args:
        indices: For each client the indices of its samples.

    Raises:
        ValueError: If there are no clients, or an index is not a whole number; in ``partition``, if an index is out of
            range or used twice.
    """

    def __init__(self, indices: Iterable[Iterable[int]]) -> None:
        try:
            per_client = arguments.plain_list(indices)
        except TypeError:  # not iterable
            raise arguments.invalid("indices", "one list of sample indices per client", indices) from None
        chosen = []
        for client, samples in enumerate(per_client):
            checked = arguments.integers(
                "indices",
                samples,
                allowed="lists of whole numbers, one per client",
                hint=f"That is the list of client {client}.",
            )
            chosen.append(torch.tensor(checked, dtype=torch.int64))
        if not chosen:
            raise ValueError("`indices` must be one list of sample indices per client, got no client.")
        self._indices = tuple(chosen)

    @property
    def num_clients(self) -> int:
        """The number of index lists."""
        return len(self._indices)

    def split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """Give each client the samples of its list; the seed changes nothing."""
        used = sum(len(samples) for samples in self._indices)
        return Partition(self._indices, dropped=len(labels) - used)

"""Splits that are given, not drawn: by a key of each sample, or by lists of indices.

Shapes: K clients.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
import torch

from lightning_fedhaw.data.partitioners.base import Partitioner, plain_list
from lightning_fedhaw.data.partitioners.partition import Integers, Partition


class NaturalIdPartitioner(Partitioner):
    """One client for each distinct value of a key, such as the speaker or the hospital that a sample comes from.

    Args:
        keys: The key of every sample ``[samples]``: a sequence, array, tensor or column of hashable values.

    Attributes:
        names: The key of each client, in the order of first appearance.

    Raises:
        TypeError: If a key cannot be hashed.
        ValueError: If there are no keys or one is missing (None or NaN).
    """

    def __init__(self, keys: Iterable[Hashable]) -> None:
        if isinstance(keys, str):
            raise TypeError(f"`keys` must be the column of keys itself, one entry per sample, got the text {keys!r}.")
        values = plain_list(keys)
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
    """A split made elsewhere; samples that nobody is given are dropped and counted.

    Args:
        indices: For each client the indices of its samples.

    Raises:
        TypeError: If an index is not a whole number.
        ValueError: If there are no clients; in ``partition``, if an index is out of range or used twice.
    """

    def __init__(self, indices: Iterable[Iterable[int]]) -> None:
        lists = list(indices)
        if not all(isinstance(samples, Iterable) for samples in lists):
            raise TypeError(f"`indices` must be a list of lists, one per client, got {lists[:5]}.")
        if not lists:
            raise ValueError("`indices` must be one list of sample indices per client, got no client.")
        chosen = []
        for client, samples in enumerate(lists):
            numbers = plain_list(samples)
            if not all(type(number) is int for number in numbers):
                raise TypeError(f"`indices` must be lists of whole numbers, got {numbers[:5]} .. for client {client}.")
            chosen.append(torch.tensor(numbers, dtype=torch.int64))
        self._indices = tuple(chosen)

    @property
    def num_clients(self) -> int:
        """The number of index lists."""
        return len(self._indices)

    def split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """Give each client the samples of its list; the seed changes nothing."""
        used = sum(len(samples) for samples in self._indices)
        return Partition(self._indices, dropped=len(labels) - used)

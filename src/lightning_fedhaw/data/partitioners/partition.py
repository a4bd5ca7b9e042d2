"""The result of a partitioner: the samples of each client.

Shapes: K clients, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Partition:
    """One split of a data set; compare two by their :meth:`fingerprint`.

    Attributes:
        indices: For each client the int64 indices ``[n_k]`` of its samples; sorted ascending on construction.
        dropped: Samples that belong to no client, because the scheme leaves some out by definition.
        label_swaps: Client -> the two labels that are swapped in its training data.
        scheme: The partitioner that made it, with its settings; long settings are left out.
    """

    indices: tuple[Tensor, ...]
    dropped: int = 0
    label_swaps: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    scheme: str = ""

    def __post_init__(self) -> None:
        ascending = []
        for chosen in self.indices:
            # Sorting also copies: a slice of a shared array would take the whole array along when it is pickled.
            ascending.append(torch.as_tensor(chosen, dtype=torch.int64).sort().values)
        object.__setattr__(self, "indices", tuple(ascending))

    @classmethod
    def from_owners(cls, owners: Integers, num_clients: int) -> Partition:
        """Make the partition in which sample i belongs to client ``owners[i]``, or to none where that is -1.

        Args:
            owners: ``[samples]``, entries in ``-1 .. num_clients - 1``.
            num_clients: K.
        """
        by_owner = np.argsort(owners, kind="stable")
        counts = np.bincount(owners + 1, minlength=num_clients + 1)  # [1 + K], first the samples of no client
        dropped, *chosen = np.split(by_owner, np.cumsum(counts)[:-1])
        return cls(tuple(torch.from_numpy(samples) for samples in chosen), dropped=len(dropped))

    @property
    def sizes(self) -> Tensor:
        """Samples of each client, int64 ``[K]``."""
        return torch.tensor([len(chosen) for chosen in self.indices], dtype=torch.int64)

    def histogram(self, labels: Tensor, num_classes: int | None = None) -> Tensor:
        """Count the samples of each client in each class, label swaps applied.

        Args:
            labels: Labels of the whole data set before any swap, non-negative integers ``[samples]``.
            num_classes: C, the width of the table. Default: one more than the largest label.

        Returns:
            Counts, int64 ``[K, C]``.

        Raises:
            ValueError: If a label is negative or not below ``num_classes``.
        """
        labels = torch.as_tensor(labels, dtype=torch.int64, device="cpu")
        smallest = int(labels.min())
        largest = int(labels.max())
        for pair in self.label_swaps.values():
            largest = max(largest, *pair)
        width = largest + 1 if num_classes is None else num_classes
        if smallest < 0 or largest >= width:
            raise ValueError(
                f"`labels` must lie in 0 .. {width - 1}, got values from {smallest} to {largest};"
                " renumber them or give a larger `num_classes`."
            )
        rows = []
        for client, chosen in enumerate(self.indices):
            labels_of_client = labels[chosen]
            if client in self.label_swaps:
                labels_of_client = swap_labels(labels_of_client, self.label_swaps[client])
            rows.append(torch.bincount(labels_of_client, minlength=width))
        return torch.stack(rows)

    def fingerprint(self) -> str:
        """Hash the clients' samples and the swaps to sixteen hex digits that are the same on every machine."""
        digest = hashlib.blake2b(digest_size=8)
        for chosen in self.indices:
            # The length, so that moving a sample to the next client is another partition.
            digest.update(len(chosen).to_bytes(8, "little"))
            digest.update(chosen.numpy().astype("<i8").tobytes())
        swaps = [(client, *self.label_swaps[client]) for client in sorted(self.label_swaps)]
        digest.update(repr(swaps).encode())
        return digest.hexdigest()


def swap_labels(labels: Tensor, pair: tuple[int, int]) -> Tensor:
    """Swap the two labels of ``pair``; doing it twice restores them.

    Example:
        >>> swap_labels(torch.tensor([0, 1, 2, 1]), (1, 2)).tolist()
        [0, 2, 1, 2]
    """
    first, second = pair
    return torch.where(labels == first, second, torch.where(labels == second, first, labels))

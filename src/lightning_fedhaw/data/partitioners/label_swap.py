"""Clients in whose training data two labels are swapped."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

import numpy as np
import torch

from lightning_fedhaw import arguments
from lightning_fedhaw.data.partitioners.base import Partitioner, checked_base
from lightning_fedhaw.data.partitioners.counts import generator
from lightning_fedhaw.data.partitioners.partition import Integers, Partition


@dataclass(frozen=True)
class LabelSwapPartitioner(Partitioner):
    """Corrupted clients: a share of the clients has two labels swapped in its training data (FedLAW, Li et al. 2023).

    The split itself is the one that ``base`` makes with the same seed.

    Attributes:
        base: Splits the data.
        fraction: Share of the clients that are corrupted, in [0, 1], rounded to the nearest number, halves up.
        labels: The two labels that are swapped. Default: a pair drawn from the labels that occur.
        per_client: Whether a pair is drawn for each corrupted client.

    Raises:
        TypeError: If ``base`` is not a partitioner.
        ValueError: If an argument is out of range, or ``labels`` are given with ``per_client``; in ``partition``, if
            the labels do not occur, or ``base`` swaps labels already.
    """

    base: Partitioner
    fraction: float
    labels: tuple[int, int] | None = None
    per_client: bool = False
    needs_labels = True

    def __post_init__(self) -> None:
        fraction = arguments.probability("fraction", self.fraction, hint="It is a share of the clients.")
        object.__setattr__(self, "base", checked_base(self.base))
        object.__setattr__(self, "fraction", fraction)
        object.__setattr__(self, "per_client", arguments.flag("per_client", self.per_client))
        if self.labels is None:
            return
        if self.per_client:
            raise ValueError(f"`labels` must be None with `per_client`, which draws a pair each, got {self.labels!r}.")
        allowed = "two different whole numbers, such as (1, 7)"
        pair = arguments.integers("labels", self.labels, allowed=allowed)
        if len(pair) != 2 or pair[0] == pair[1]:
            raise arguments.invalid("labels", allowed, self.labels)
        object.__setattr__(self, "labels", tuple(pair))

    @property
    def num_clients(self) -> int | None:
        """The number of clients that ``base`` determines; None if it accepts any number."""
        return self.base.num_clients

    def split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """Let the base split, draw the corrupted clients, and record the pair of each."""
        occurring = np.unique(labels)
        self._check_occurring(occurring)
        partition = self.base.partition(
            num_clients, num_samples=len(labels), labels=torch.from_numpy(labels), seed=seed
        )
        if partition.label_swaps:
            raise ValueError(f"`base` must not swap labels itself, got {self.base}; swap once.")
        rng = generator(seed, "label-swap")
        # `round` would round halves to even.
        count = floor(self.fraction * num_clients + 0.5)
        corrupted = sorted(rng.permutation(num_clients)[:count].tolist())
        common = self.labels
        if common is None and not self.per_client:
            common = _draw_pair(rng, occurring)
        swaps = {}
        # In ascending order, because the pairs are drawn from one stream, client after client.
        for client in corrupted:
            swaps[client] = _draw_pair(rng, occurring) if common is None else common
        return Partition(partition.indices, partition.dropped, swaps)

    def _check_occurring(self, occurring: Integers) -> None:
        """Refuse a pair that is not among the labels that occur, ``[C]`` in ascending order."""
        if len(occurring) >= 2 and set(self.labels or ()) <= set(occurring.tolist()):
            return
        shown = ", ".join(str(label) for label in occurring[:20])
        more = " .." if len(occurring) > 20 else ""
        raise ValueError(
            f"`labels` must be two that occur in the data, got {self.labels} where there are {shown}{more}."
        )


def _draw_pair(rng: np.random.Generator, labels: Integers) -> tuple[int, int]:
    """Draw two different labels of those that occur, ``[C]``."""
    first, second = rng.choice(labels, size=2, replace=False).tolist()
    return first, second

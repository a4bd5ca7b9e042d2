"""Clients that take two labels for each other."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

import numpy as np
import torch

from lightning_fedhaw.data.partitioners.base import Partitioner, check_base
from lightning_fedhaw.data.partitioners.counts import generator
from lightning_fedhaw.data.partitioners.partition import Integers, Partition
from lightning_fedhaw.options import is_number


@dataclass(frozen=True)
class LabelSwapPartitioner(Partitioner):
    """Corrupted clients: a share of the clients has two labels mixed up in its training data (FedLAW, Li et al. 2023).

    The split itself is the one that ``base`` makes with the same seed.

    Attributes:
        base: Splits the data.
        fraction: Share of the clients that are corrupted, in [0, 1], rounded to the nearest number, halves up.
        labels: The two labels that change places. Default: a pair drawn from the labels that occur.
        per_client: Whether each corrupted client draws its own pair.

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
        check_base(self.base)
        if not (is_number(self.fraction) and 0 <= self.fraction <= 1):
            raise ValueError(f"`fraction` must be a share of the clients in [0, 1], got {self.fraction!r}.")
        if self.labels is None:
            return
        if self.per_client:
            raise ValueError(f"`labels` must be None with `per_client`, which draws a pair each, got {self.labels!r}.")
        pair = tuple(self.labels)
        if len(pair) != 2 or pair[0] == pair[1] or not all(type(label) is int for label in pair):
            raise ValueError(f"`labels` must be two different whole numbers, such as (1, 7), got {self.labels!r}.")
        object.__setattr__(self, "labels", pair)

    @property
    def num_clients(self) -> int | None:
        """The number of clients that ``base`` dictates, if it does."""
        return self.base.num_clients

    def split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """Let the base split, draw who is corrupted, and note the pair of each."""
        occurring = np.unique(labels)
        self._check_occurring(occurring)
        inner = self.base.partition(num_clients, num_samples=len(labels), labels=torch.from_numpy(labels), seed=seed)
        if inner.label_swaps:
            raise ValueError(f"`base` must not swap labels itself, got {self.base}; swap once.")
        rng = generator(seed, "label-swap")
        count = floor(self.fraction * num_clients + 0.5)
        corrupted = sorted(rng.permutation(num_clients)[:count].tolist())
        common = self.labels
        if common is None and not self.per_client:
            common = _drawn_pair(rng, occurring)
        swaps = {}
        for client in corrupted:
            swaps[client] = _drawn_pair(rng, occurring) if common is None else common
        return Partition(inner.indices, inner.dropped, swaps)

    def _check_occurring(self, occurring: Integers) -> None:
        """Refuse a pair that is not among the labels that occur, ``[C]`` in ascending order."""
        if len(occurring) >= 2 and set(self.labels or ()) <= set(occurring.tolist()):
            return
        shown = ", ".join(str(label) for label in occurring[:20])
        more = " .." if len(occurring) > 20 else ""
        raise ValueError(
            f"`labels` must be two that occur in the data, got {self.labels} where there are {shown}{more}."
        )


def _drawn_pair(rng: np.random.Generator, labels: Integers) -> tuple[int, int]:
    first, second = rng.choice(labels, size=2, replace=False).tolist()
    return first, second

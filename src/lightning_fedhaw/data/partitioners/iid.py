"""The split without any skew."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fedhaw.data.partitioners.base import Partitioner
from lightning_fedhaw.data.partitioners.counts import assign_samples, equal_sizes, generator
from lightning_fedhaw.data.partitioners.partition import Integers, Partition


@dataclass(frozen=True)
class IIDPartitioner(Partitioner):
    """A random split into equal parts; sizes differ by one at most."""

    def split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """Assign equal parts of the shuffled samples."""
        counts = equal_sizes(num_clients, len(labels))[:, None]  # [K, 1]: all samples count as one class
        return assign_samples(generator(seed, "iid"), labels, counts)

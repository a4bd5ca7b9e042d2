"""From what the user said to a partition: the defaults of a split, and what they assumed."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset

from lightning_fedhaw.data.labels import find_labels, stored_labels
from lightning_fedhaw.data.partitioners import DirichletPartitioner, IIDPartitioner, Partition, Partitioner

DEFAULT_CLIENTS = 10
DEFAULT_ALPHA = 0.1


def split(
    dataset: Dataset[Any],
    *,
    num_clients: int | None = None,
    alpha: float | None = None,
    partitioner: Partitioner | None = None,
    labels: Any = None,
    seed: int = 0,
) -> tuple[Partition, Tensor | None, list[str]]:
    """Split a data set over clients.

    What is not given is assumed: ten clients; a Dirichlet split of concentration 0.1 where labels are found, an IID
    split where not. If that assumed split is infeasible, the assumed number of clients is lowered.

    Args:
        dataset: A map-style data set.
        num_clients: N.
        alpha: Short for ``DirichletPartitioner(alpha)``.
        partitioner: Who gets what.
        labels: As in :func:`~lightning_fedhaw.data.find_labels`.
        seed: The federation's seed.

    Returns:
        The partition; the labels ``[samples]`` where they were needed or could be had without reading samples; and one
        phrase for each thing that was assumed.

    Raises:
        ValueError: If an explicit split is impossible, or needs labels that are not to be found.
    """
    samples = len(cast(Sized, dataset))
    if partitioner is None and alpha is not None:
        partitioner = DirichletPartitioner(alpha)
    if partitioner is not None:
        count = num_clients or partitioner.num_clients or DEFAULT_CLIENTS
        found = find_labels(dataset, labels) if partitioner.needs_labels else stored_labels(dataset)
        partition = partitioner.partition(count, num_samples=samples, labels=found, seed=seed)
        return partition, found, [] if num_clients or partitioner.num_clients else [f"{count} clients"]

    found = find_labels(dataset, labels)
    if found is None:
        partitioner, scheme = IIDPartitioner(), "an IID split, since the data set shows no labels"
    else:
        partitioner, scheme = DirichletPartitioner(DEFAULT_ALPHA), f"a label-skewed Dirichlet({DEFAULT_ALPHA}) split"
    if num_clients is not None:
        return partitioner.partition(num_clients, num_samples=samples, labels=found, seed=seed), found, [scheme]
    for count in range(DEFAULT_CLIENTS, 0, -1):
        try:
            partition = partitioner.partition(count, num_samples=samples, labels=found, seed=seed)
        except ValueError:
            if count == 1:
                raise
            continue
        fewer = "" if count == DEFAULT_CLIENTS else f" (the split is infeasible for {DEFAULT_CLIENTS})"
        return partition, found, [f"{count} clients{fewer}", scheme]
    raise AssertionError("unreachable: the loop returns or raises at one client")

"""From what the user gave to a partition: the defaults of a split, and which of them were used."""

from __future__ import annotations

from collections.abc import Sized
from typing import cast

from torch import Tensor
from torch.utils.data import Dataset

from lightning_fedhaw.data.labels import find_labels, stored_labels
from lightning_fedhaw.data.partitioners import DirichletPartitioner, IIDPartitioner, Partition, Partitioner

DEFAULT_CLIENTS = 10
DEFAULT_ALPHA = 0.1


def split(
    dataset: Dataset[object],
    *,
    num_clients: int | None = None,
    alpha: float | None = None,
    partitioner: Partitioner | None = None,
    labels: object = None,
    seed: int = 0,
) -> tuple[Partition, Tensor | None, list[str]]:
    """Split a data set over clients.

    Defaults are ten clients, and a Dirichlet split of concentration 0.1 where labels are found, else an IID split.
    If both are defaults and the split is infeasible, the number of clients is lowered until it is feasible.

    Args:
        dataset: A map-style data set.
        num_clients: N.
        alpha: Short for ``DirichletPartitioner(alpha)``.
        partitioner: The scheme of the split.
        labels: As in :func:`~lightning_fedhaw.data.find_labels`.
        seed: The federation's seed.

    Returns:
        The partition; the labels ``[samples]`` where they were needed or are stored; and one phrase for each default
        that was used.

    Raises:
        ValueError: If an explicit split is impossible, or needs labels and none are found.
    """
    if partitioner is None and alpha is not None:
        partitioner = DirichletPartitioner(alpha)
    if partitioner is None:
        return _default_split(dataset, num_clients, labels, seed)
    return _explicit_split(dataset, num_clients, partitioner, labels, seed)


def _explicit_split(
    dataset: Dataset[object], num_clients: int | None, partitioner: Partitioner, labels: object, seed: int
) -> tuple[Partition, Tensor | None, list[str]]:
    """Split by the partitioner that the user gave; only the number of clients may be a default."""
    assumptions = []
    count = num_clients or partitioner.num_clients
    if not count:
        count = DEFAULT_CLIENTS
        assumptions.append(f"{count} clients")
    # Labels that the split does not need are for reports only, which are not worth reading every sample.
    known_labels = find_labels(dataset, labels) if partitioner.needs_labels else stored_labels(dataset)
    num_samples = len(cast(Sized, dataset))
    partition = partitioner.partition(count, num_samples=num_samples, labels=known_labels, seed=seed)
    return partition, known_labels, assumptions


def _default_split(
    dataset: Dataset[object], num_clients: int | None, labels: object, seed: int
) -> tuple[Partition, Tensor | None, list[str]]:
    """Split by the default scheme, over fewer clients than the default number where that is infeasible."""
    num_samples = len(cast(Sized, dataset))
    known_labels = find_labels(dataset, labels)
    partitioner: Partitioner
    if known_labels is None:
        partitioner = IIDPartitioner()
        scheme = "an IID split, since no labels were found in the data set"
    else:
        partitioner = DirichletPartitioner(DEFAULT_ALPHA)
        scheme = f"a label-skewed Dirichlet({DEFAULT_ALPHA}) split"
    if num_clients is not None:
        partition = partitioner.partition(num_clients, num_samples=num_samples, labels=known_labels, seed=seed)
        return partition, known_labels, [scheme]

    for count in range(DEFAULT_CLIENTS, 0, -1):
        try:
            partition = partitioner.partition(count, num_samples=num_samples, labels=known_labels, seed=seed)
        except ValueError:
            # The user did not ask for this number of clients. With one client the cause must be another one.
            if count == 1:
                raise
            continue
        clients = f"{count} clients"
        if count < DEFAULT_CLIENTS:
            clients += f" (the split is infeasible for {DEFAULT_CLIENTS})"
        return partition, known_labels, [clients, scheme]
    raise AssertionError("unreachable: the loop returns or raises at one client")

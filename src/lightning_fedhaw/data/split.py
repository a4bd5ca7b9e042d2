"""From what the user gave to a partition: the defaults of a split, and which of them were used."""

from __future__ import annotations

from collections.abc import Sized
from typing import NamedTuple, cast

from torch.utils.data import Dataset

from lightning_fedhaw.data.labels import ClassLabels, find_classes, stored_classes
from lightning_fedhaw.data.partitioners import DirichletPartitioner, IIDPartitioner, Partition, Partitioner

DEFAULT_CLIENTS = 10
DEFAULT_ALPHA = 0.1


class Split(NamedTuple):
    """A data set that is split over clients.

    Attributes:
        partition: The samples of each client.
        classes: The labels and the names of classes, where they were needed or are stored.
        assumptions: One phrase for each default that was used.
        partitioner: The scheme.
    """

    partition: Partition
    classes: ClassLabels | None
    assumptions: list[str]
    partitioner: Partitioner


def split(
    dataset: Dataset[object],
    *,
    num_clients: int | None = None,
    alpha: float | None = None,
    partitioner: Partitioner | None = None,
    labels: object = None,
    seed: int = 0,
    bulk: bool = False,
) -> Split:
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
        bulk: Whether the data set takes lists of indices instead of single ones.

    Raises:
        ValueError: If an explicit split is impossible, or needs labels and none are found.
    """
    if partitioner is None and alpha is not None:
        partitioner = DirichletPartitioner(alpha)
    if partitioner is None:
        return _default_split(dataset, num_clients, labels, seed, bulk)
    return _explicit_split(dataset, num_clients, partitioner, labels, seed, bulk)


def _explicit_split(
    dataset: Dataset[object],
    num_clients: int | None,
    partitioner: Partitioner,
    labels: object,
    seed: int,
    bulk: bool,
) -> Split:
    """Split by the partitioner that the user gave; only the number of clients may be a default."""
    assumptions = []
    count = num_clients or partitioner.num_clients
    if not count:
        count = DEFAULT_CLIENTS
        assumptions.append(f"{count} clients")
    # Labels that the split does not need are for reports only, which are not worth reading every sample.
    classes = find_classes(dataset, labels, bulk=bulk) if partitioner.needs_labels else stored_classes(dataset)
    known_labels = None if classes is None else classes.labels
    num_samples = len(cast(Sized, dataset))
    partition = partitioner.partition(count, num_samples=num_samples, labels=known_labels, seed=seed)
    return Split(partition, classes, assumptions, partitioner)


def _default_split(dataset: Dataset[object], num_clients: int | None, labels: object, seed: int, bulk: bool) -> Split:
    """Split by the default scheme, over fewer clients than the default number where that is infeasible."""
    num_samples = len(cast(Sized, dataset))
    classes = find_classes(dataset, labels, bulk=bulk)
    partitioner: Partitioner
    if classes is None:
        known_labels = None
        partitioner = IIDPartitioner()
        scheme = "an IID split, since no labels were found in the data set"
    else:
        known_labels = classes.labels
        partitioner = DirichletPartitioner(DEFAULT_ALPHA)
        scheme = f"a label-skewed Dirichlet({DEFAULT_ALPHA}) split"
    if num_clients is not None:
        partition = partitioner.partition(num_clients, num_samples=num_samples, labels=known_labels, seed=seed)
        return Split(partition, classes, [scheme], partitioner)

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
        return Split(partition, classes, [clients, scheme], partitioner)
    raise AssertionError("unreachable: the loop returns or raises at one client")

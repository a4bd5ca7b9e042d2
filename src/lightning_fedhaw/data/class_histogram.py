"""How many samples of each class each client has, whatever numbers the labels are.

Shapes: K clients, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fedhaw.data.labels import ClassLabels
from lightning_fedhaw.data.partitioners.partition import Partition

MAX_CLASSES = 1000
"""Labels in 0 .. 999 are always classes; with more distinct ones, other labels are taken for another quantity."""


class ClassHistogram(NamedTuple):
    """The samples of each client in each class.

    Attributes:
        counts: int64 ``[K, C]``.
        names: The name of each class ``[C]``; None where that is its number.
    """

    counts: Tensor
    names: tuple[str, ...] | None


def class_histogram(
    partition: Partition, classes: ClassLabels, *, most_columns: int = MAX_CLASSES
) -> ClassHistogram | None:
    """Count the samples of each client in each class, label swaps applied.

    Labels in ``0 .. most_columns - 1`` have a column for every number up to the largest. Other labels, such as -1 for
    unlabeled samples or the ids of a taxonomy, have a column for each that occurs.

    Args:
        partition: The samples of each client.
        classes: The label of every sample.
        most_columns: The largest C of labels that are numbers of columns.

    Returns:
        The histogram; None if there are no samples, or the labels are too many distinct ones to be classes.
    """
    labels = classes.labels
    if not len(labels):
        return None
    if int(labels.min()) >= 0 and int(labels.max()) < most_columns:
        return ClassHistogram(partition.histogram(labels), _padded(classes.names, partition))
    # A class that only swaps name has no sample, but needs a column all the same.
    swapped = list(chain.from_iterable(partition.label_swaps.values()))
    distinct = torch.unique(torch.cat([labels, torch.tensor(swapped, dtype=torch.int64)]))  # [C], ascending
    if len(distinct) > MAX_CLASSES:
        return None
    column_of = {label: column for column, label in enumerate(distinct.tolist())}
    swaps = {}
    for client, (first, second) in partition.label_swaps.items():
        swaps[client] = (column_of[first], column_of[second])
    columns = torch.searchsorted(distinct, labels)
    counts = replace(partition, label_swaps=swaps).histogram(columns, len(distinct))
    return ClassHistogram(counts, tuple(map(str, column_of)))


def _padded(names: tuple[str, ...] | None, partition: Partition) -> tuple[str, ...] | None:
    """Name the classes that only a label swap knows by their numbers."""
    if names is None:
        return None
    largest = max(chain.from_iterable(partition.label_swaps.values()), default=0)
    return (*names, *map(str, range(len(names), largest + 1)))

"""Sets with a given number of samples of each class, cut out of training data.

Shapes: C classes that occur in the data, in ascending order of label.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.data.partitioners.base import integer_labels
from lightning_fedhaw.data.partitioners.counts import assign_samples, count_classes, generator


def balanced_subset(labels: Tensor, total: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cut a class-balanced set, such as a server's proxy data, out of training data.

    Args:
        labels: Integer labels of the training data, ``[samples]``, of C classes.
        total: Samples to take; ``total // C`` are taken of each class, so that the set may have up to C - 1 fewer.
        seed: The federation's seed.

    Returns:
        The chosen indices, int64 ``[C * (total // C)]``, and the remaining indices; both ascending.

    Raises:
        TypeError: If the labels are not integers.
        ValueError: If there are no samples, ``total`` is less than C, or a class has too few samples.
    """
    total = arguments.integer("total", total, minimum=1)
    num_classes = len(count_classes(integer_labels(labels)))
    if not num_classes:
        raise ValueError("`labels` must be those of at least one sample, got none.")
    if total < num_classes:
        raise ValueError(f"`total` must be at least one sample for each of {num_classes} classes, got {total}.")
    return subset_by_class(labels, [total // num_classes] * num_classes, seed)


def subset_by_class(labels: Tensor, counts: ArrayLike, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cut a random set with the given number of samples of each class out of training data.

    Args:
        labels: Integer labels of the training data, ``[samples]``, of C classes.
        counts: Samples to take of each class that occurs, in ascending order of label, ``[C]``; with
            ``long_tail_counts([20] * 10, 10)`` a long-tailed proxy set.
        seed: The federation's seed.

    Returns:
        The chosen indices and the remaining indices, int64, both ascending.

    Raises:
        TypeError: If the labels are not integers.
        ValueError: If ``counts`` does not have C entries, or a class has too few samples.
    """
    values = integer_labels(labels)
    available = count_classes(values)
    allowed = f"{len(available)} whole numbers of at least 0, one per class"
    requested = np.array(arguments.integers("counts", counts, minimum=0, allowed=allowed), dtype=np.int64)
    if requested.shape != available.shape:
        raise arguments.invalid("counts", allowed, counts)
    if (requested > available).any():
        scarcest = int(np.argmax(requested - available))
        raise ValueError(
            f"`counts` must be at most what each class has, got {requested[scarcest]} for class"
            f" {np.unique(values)[scarcest]}, which has {available[scarcest]} samples; take fewer in all."
        )
    # The cut is a partition over two clients: one has the requested samples, the other the remaining ones.
    counts_of_both = np.stack([requested, available - requested])  # [2, C]
    chosen, remaining = assign_samples(generator(seed, "subset"), values, counts_of_both).indices
    return chosen, remaining

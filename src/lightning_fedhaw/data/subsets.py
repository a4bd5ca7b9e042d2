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
        total: Samples wanted; ``total // C`` are taken of each class, so that up to C - 1 fewer may come.
        seed: The federation's seed.

    Returns:
        Indices chosen, int64 ``[C * (total // C)]``, and the indices of the rest; both ascending.

    Raises:
        TypeError: If the labels are not integers.
        ValueError: If ``total`` is less than C, or a class has too few samples.
    """
    total = arguments.integer("total", total, minimum=1)
    num_classes = len(count_classes(integer_labels(labels)))
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
        Indices chosen and the indices of the rest, int64, both ascending.

    Raises:
        TypeError: If the labels are not integers.
        ValueError: If ``counts`` does not have C entries, or a class has too few samples.
    """
    values = integer_labels(labels)
    available = count_classes(values)
    allowed = f"{len(available)} whole numbers of at least 0, one per class"
    wanted = np.array(arguments.integers("counts", counts, minimum=0, allowed=allowed), dtype=np.int64)
    if wanted.shape != available.shape:
        raise arguments.invalid("counts", allowed, counts)
    if (wanted > available).any():
        short = int(np.argmax(wanted - available))
        raise ValueError(
            f"`counts` must be at most what each class has, got {wanted[short]} for class {np.unique(values)[short]},"
            f" which has {available[short]} samples; take fewer in all."
        )
    # Two clients are a way to cut: who gets what was asked for, and who gets the rest.
    both = np.stack([wanted, available - wanted])  # [2, C]
    chosen, rest = assign_samples(generator(seed, "subset"), values, both).indices
    return chosen, rest

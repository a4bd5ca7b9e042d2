"""Skews other than label skew by a Dirichlet distribution: shards, clients of unequal size, long tails.

Shapes: K clients, C classes that occur in the data (in ascending order of label), counts ``[K, C]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lightning_fedhaw import arguments
from lightning_fedhaw.data.partitioners.base import Partitioner, checked_base
from lightning_fedhaw.data.partitioners.counts import (
    assign_samples,
    concentration,
    count_classes,
    dirichlet,
    generator,
    largest_remainder,
    redraw,
    shuffled_by_class,
    smaller_limit,
    smallest_allowed,
)
from lightning_fedhaw.data.partitioners.partition import Integers, Partition


@dataclass(frozen=True)
class ShardPartitioner(Partitioner):
    """A few shards of label-sorted data per client, so that most clients see few labels; McMahan et al. 2017 (FedAvg).

    That paper splits MNIST over 100 clients with 2 shards of 300 samples. Remaining samples are dropped and counted.

    Attributes:
        shards_per_client: Shards that each client gets.
        shard_size: Samples in a shard. Default: as many as the number of samples allows.

    Raises:
        ValueError: If an argument is not a positive whole number; in ``partition``, if there are too few samples.
    """

    shards_per_client: int = 2
    shard_size: int | None = None
    needs_labels = True

    def __post_init__(self) -> None:
        shards = arguments.integer("shards_per_client", self.shards_per_client, minimum=1)
        shard_size = arguments.optional(arguments.integer, "shard_size", self.shard_size, minimum=1)
        object.__setattr__(self, "shards_per_client", shards)
        object.__setattr__(self, "shard_size", shard_size)

    def split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """Cut the samples, sorted by label, into shards, and assign the shards at random."""
        needed = num_clients * self.shards_per_client
        size = max(1, len(labels) // needed) if self.shard_size is None else self.shard_size
        available = len(labels) // size
        if available < needed:
            name = "shards_per_client" if self.shard_size is None else "shard_size"
            raise ValueError(
                f"`{name}` must leave enough samples for {needed} shards ({num_clients} clients with"
                f" {self.shards_per_client} each), got {getattr(self, name)}, which {len(labels)} samples fill"
                f" {available} times; use smaller or fewer shards."
            )
        rng = generator(seed, "shards")
        order = shuffled_by_class(rng, labels)
        owners_of_shards = np.full(available, -1)  # [shards]
        owners_of_shards[rng.permutation(available)[:needed]] = np.repeat(
            np.arange(num_clients), self.shards_per_client
        )
        owners = np.full(len(labels), -1)
        owners[order[: available * size]] = np.repeat(owners_of_shards, size)
        return Partition.from_owners(owners, num_clients)


@dataclass(frozen=True)
class QuantitySkewPartitioner(Partitioner):
    """Clients of different sizes, each with a random sample of the data.

    Sizes are proportional to LogNormal(., ``sigma``), as in FedLab and FedDyn (Acar et al. 2021), or are drawn from
    Dir(``alpha``) over the clients, as in Li et al. 2022 ("Federated Learning on Non-IID Data Silos").

    Attributes:
        sigma: Standard deviation of the logarithm of a client's size, at least 0; 0 gives equal sizes. Default: 1,
            unless ``alpha`` is given.
        alpha: Concentration, positive; excludes ``sigma``.
        min_size: As for :class:`DirichletPartitioner`.
        max_tries: Draws before ``min_size`` is given up with an error.

    Raises:
        ValueError: If an argument is out of range, or both ``sigma`` and ``alpha`` are given.
    """

    sigma: float | None = None
    alpha: float | None = None
    min_size: int | None = None
    max_tries: int = 1000

    def __post_init__(self) -> None:
        if self.sigma is not None and self.alpha is not None:
            raise ValueError(f"Give `sigma` or `alpha`, not both, got {self.sigma!r} and {self.alpha!r}.")
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)

    def _checked(self) -> dict[str, Any]:
        return {
            "sigma": arguments.optional(
                arguments.number, "sigma", self.sigma, minimum=0, hint="0 gives clients of equal size."
            ),
            "alpha": arguments.optional(concentration, "alpha", self.alpha),
            "min_size": arguments.optional(arguments.integer, "min_size", self.min_size, minimum=1),
            "max_tries": arguments.integer("max_tries", self.max_tries, minimum=1),
        }

    def split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """Draw the sizes, and assign samples by them."""
        counts = np.array(self.sizes(num_clients, len(labels), seed))[:, None]  # [K, 1]
        return assign_samples(generator(seed, "quantity-skew"), labels, counts)

    def sizes(self, num_clients: int, num_samples: int, seed: int = 0) -> list[int]:
        """Draw the samples of each client, ``[K]`` of sum ``num_samples``."""
        num_clients = arguments.integer("num_clients", num_clients, minimum=1)
        num_samples = arguments.integer("num_samples", num_samples, minimum=num_clients)
        rng = generator(seed, "quantity-skew", "sizes")

        def draw() -> Integers:
            return largest_remainder(self._shares(rng, num_clients), num_samples)[:, None]  # [K, 1]

        least = smallest_allowed(self.min_size, num_clients, num_samples)
        setting = f"sigma={self._sigma:g}" if self.alpha is None else f"alpha={self.alpha:g}"
        counts = redraw(
            draw,
            least,
            self.max_tries,
            "raise",
            scheme=f"A split with quantity skew (`{setting}`)",
            remedies=[
                "a smaller `sigma`" if self.alpha is None else "a larger `alpha`",
                *smaller_limit(least, f"QuantitySkewPartitioner({setting}"),
            ],
        )
        sizes: list[int] = counts[:, 0].tolist()
        return sizes

    @property
    def _sigma(self) -> float:
        """``sigma``, or its default."""
        return 1.0 if self.sigma is None else self.sigma

    def _shares(self, rng: np.random.Generator, num_clients: int) -> NDArray[np.float64]:
        """Draw proportions of the clients' sizes, ``[K]``."""
        if self.alpha is not None:
            return dirichlet(rng, self.alpha, num_clients)
        logs = self._sigma * rng.standard_normal(num_clients)
        shares: NDArray[np.float64] = np.exp(
            logs - logs.max()
        )  # only ratios matter; without the shift, `exp` could overflow
        return shares


@dataclass(frozen=True)
class LongTailPartitioner(Partitioner):
    """Class imbalance in the whole federation: classes are cut by ``long_tail_counts``, then ``base`` splits.

    FedLAW (Li et al. 2023) uses ``DirichletPartitioner(alpha, "unbalanced")`` as the base. Samples that are cut away
    are dropped and counted.

    Attributes:
        rho: The ratio of the largest class to the smallest, at least 1; sizes fall in ascending order of label.
        base: Splits the remaining samples.

    Raises:
        TypeError: If ``base`` is not a partitioner.
        ValueError: If ``rho`` is below 1 or ``base`` is made for one data set; in ``partition``, if ``rho`` leaves a
            class without a sample.
    """

    rho: float
    base: Partitioner
    needs_labels = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", _checked_rho(self.rho))
        object.__setattr__(self, "base", checked_base(self.base))
        if self.base.num_clients is not None:
            raise ValueError(
                f"`base` must be a scheme that can split any data set, got {type(self.base).__name__}, which is made"
                " for one; use, for example, `DirichletPartitioner(0.1)`."
            )

    def split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """Keep a long tail of the samples, and let the base split those."""
        counts = long_tail_counts(count_classes(labels), self.rho)  # [C]
        if counts.min() == 0:
            raise ValueError(
                f"`rho` must leave every class a sample, got {self.rho:g}, which leaves class"
                f" {np.unique(labels)[counts.argmin()]} none; use a smaller `rho`."
            )
        # The long tail is the share of the only client in a partition of its own.
        tail = assign_samples(generator(seed, "long-tail"), labels, counts[None]).indices[0]
        partition = self.base.partition(
            num_clients, num_samples=len(tail), labels=torch.from_numpy(labels)[tail], seed=seed
        )
        # The base numbers the samples of the tail; convert its numbers to indices into the whole data set.
        indices = tuple(tail[chosen] for chosen in partition.indices)
        return Partition(indices, len(labels) - len(tail) + partition.dropped, partition.label_swaps)


def long_tail_counts(class_counts: ArrayLike, rho: float) -> Integers:
    """Cut class sizes so that they fall off exponentially: class c of C keeps ``floor(n_c * rho ** (-c / (C - 1)))``.

    The truncation of long-tailed CIFAR (Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples"),
    used by FedLAW (Li et al. 2023).

    Args:
        class_counts: Samples n_c of each class, ``[C]``.
        rho: The ratio of the first class to the last after the cut, if all were equal before; at least 1.

    Returns:
        Samples that each class keeps, ``[C]``.

    Raises:
        ValueError: If ``rho`` is less than 1 or not finite.

    Example:
        >>> long_tail_counts([5000] * 5, 10).tolist()
        [5000, 2811, 1581, 889, 500]
    """
    rho = _checked_rho(rho)
    full = np.asarray(class_counts, dtype=np.int64)
    exact = full * rho ** (-np.arange(len(full)) / max(len(full) - 1, 1))
    # The slack is for products that round to just below a whole number: 49 * 49 ** -1.0 is 0.99..
    counts: Integers = np.floor(exact * (1 + 1e-12)).astype(np.int64)
    return counts


def _checked_rho(rho: object) -> float:
    return arguments.number("rho", rho, minimum=1, hint="1 leaves the classes as they are.")

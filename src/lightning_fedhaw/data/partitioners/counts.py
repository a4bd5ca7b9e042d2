"""Counts: how many samples of each class each client gets; shared by the schemes that decide by them.

Shapes: K clients, C classes that occur in the data (in ascending order of label), counts ``[K, C]``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_fedhaw import arguments
from lightning_fedhaw.data.partitioners.partition import Integers, Partition
from lightning_fedhaw.streams import seed_of

OnInfeasible = Literal["raise", "move"]


def generator(seed: int, *scheme: str) -> np.random.Generator:
    """Make the generator of a scheme: a seed and a name always give the same draws."""
    return np.random.default_rng(seed_of(seed, "partition", *scheme))


def count_classes(labels: Integers) -> Integers:
    """Count the samples of each class that occurs, ``[C]``."""
    return np.unique(labels, return_counts=True)[1].astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Making counts
# ---------------------------------------------------------------------------------------------------------------------


def largest_remainder(fractions: ArrayLike, total: int) -> Integers:
    """Find whole numbers in the given proportions that sum to ``total`` (Hamilton's method).

    Every entry is rounded down, then the largest remainders, the first of equals, get one more.

    Args:
        fractions: Non-negative proportions ``[n]``; they need not sum to one.
        total: What the counts sum to.

    Returns:
        Counts ``[n]``, each less than one away from its exact share.

    Raises:
        ValueError: If a fraction is negative or not finite, if all are zero, or if ``total`` is negative.

    Example:
        >>> largest_remainder((0.15, 0.35, 0.5), 7).tolist()
        [1, 2, 4]
    """
    total = arguments.integer("total", total, minimum=0)
    weights = np.asarray(fractions, dtype=np.float64)
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"`fractions` must be non-negative finite numbers, not all zero, got {fractions!r}.")
    exact = weights / weights.sum() * total
    counts: Integers = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    missing = total - counts.sum()
    counts[by_remainder[:missing]] += 1
    return counts


def equal_sizes(num_clients: int, num_samples: int) -> Integers:
    """Share samples out evenly, ``[K]``; sizes differ by one at most."""
    return largest_remainder(np.ones(num_clients), num_samples)


def dirichlet(rng: np.random.Generator, alpha: float, size: int) -> NDArray[np.float64]:
    """Draw proportions ``[size]`` from Dir(alpha, .., alpha), also for an alpha at which NumPy's sampler underflows."""
    shares = rng.dirichlet(np.full(size, alpha))
    if abs(shares.sum() - 1.0) < 1e-6:
        return shares
    # The shares are NaN or all zero. Return the limit: one corner for a tiny alpha, the center for a huge one.
    if alpha < 1:
        corner: NDArray[np.float64] = np.eye(size)[rng.integers(size)]
        return corner
    return np.full(size, 1 / size)


def concentration(name: str, value: object) -> float:
    """Check the concentration of a Dirichlet distribution.

    Raises:
        ValueError: If it is no positive number.
    """
    return arguments.number(name, value, above=0, hint="0.1 is strong label skew, 100 nearly IID.")


# ---------------------------------------------------------------------------------------------------------------------
# Clients that are large enough
# ---------------------------------------------------------------------------------------------------------------------


def smallest_allowed(min_size: int | None, num_clients: int, num_samples: int) -> int:
    """Find the smallest client size to insist on: ``min_size``, or its default.

    Raises:
        ValueError: If there are too few samples for ``min_size``.
    """
    if min_size is None:
        half_of_equal_share = num_samples // num_clients // 2
        least = max(1, min(10, half_of_equal_share))
    else:
        least = min_size
    if least * num_clients > num_samples:
        raise ValueError(
            f"`min_size` must be at most the mean client size {num_samples / num_clients:g} ({num_samples} samples,"
            f" {num_clients} clients), got {least}."
        )
    return least


def redraw(
    draw: Callable[[], Integers],
    least: int,
    max_tries: int,
    on_infeasible: OnInfeasible,
    *,
    scheme: str,
    remedies: Sequence[str],
) -> Integers:
    """Draw counts ``[K, C]`` again and again, until every client has enough samples.

    Args:
        draw: Draws counts.
        least: Samples that every client must get.
        max_tries: Draws before giving up.
        on_infeasible: Whether giving up is an error, or a warning that samples were moved.
        scheme: The scheme, with the settings that make it skewed, for the error.
        remedies: What helps in addition to fewer clients, for the error.

    Raises:
        ValueError: If no draw was good enough, with ``on_infeasible="raise"``.
    """
    for _ in range(max_tries):
        counts = draw()
        smallest = int(counts.sum(axis=1).min())
        if smallest >= least:
            return counts
    if on_infeasible == "raise":
        helps = ["fewer clients (`num_clients`)", *remedies]
        raise ValueError(
            f"{scheme} leaves clients with too few samples: in {max_tries} tries no draw gave each of {len(counts)}"
            f" clients at least {least} (`min_size`) of the {int(counts.sum())} samples; in the last one a client got"
            f" {smallest}. What helps: {', '.join(helps[:-1])}, or {helps[-1]}."
        )
    warnings.warn(
        f"No draw in {max_tries} tries gave all {len(counts)} clients `min_size`={least} samples; samples were moved"
        " from the largest clients to the smallest.",
        stacklevel=4,  # the caller of Partitioner.partition
    )
    return _top_up(counts, least)


def smaller_limit(least: int, call: str) -> list[str]:
    """Name the remedy of a smaller ``min_size``, where there is one.

    Args:
        least: The limit in force.
        call: The partitioner with its settings, without the closing parenthesis.
    """
    if least <= 1:
        return []
    return [f"smaller clients (`partitioner={call}, min_size=1)`)"]


def _top_up(counts: Integers, least: int) -> Integers:
    """Move samples from the largest client to the smallest until every client has ``least``."""
    counts = counts.copy()
    sizes = counts.sum(axis=1)
    while sizes.min() < least:
        smallest_client = sizes.argmin()
        largest_client = sizes.argmax()
        label = counts[largest_client].argmax()
        # The largest client keeps `least`. It has more than that, since `least` is at most the mean: the loop ends.
        num_moved = min(least - sizes[smallest_client], sizes[largest_client] - least, counts[largest_client, label])
        counts[largest_client, label] -= num_moved
        counts[smallest_client, label] += num_moved
        sizes = counts.sum(axis=1)
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# From counts to samples
# ---------------------------------------------------------------------------------------------------------------------


def assign_samples(rng: np.random.Generator, labels: Integers, counts: Integers) -> Partition:
    """Assign ``counts[k, c]`` random samples of class c to client k, and the remaining samples to no client.

    Args:
        rng: The generator of the draw.
        labels: ``[samples]``.
        counts: ``[K, C]``.
    """
    num_clients, num_classes = counts.shape
    remaining = count_classes(labels) - counts.sum(axis=0)
    table = np.vstack([counts, remaining])  # [K + 1, C]
    clients = np.append(np.arange(num_clients), -1)  # [K + 1]; -1 is no client
    owners_by_class = np.repeat(np.tile(clients, num_classes), table.T.ravel())  # [samples], class by class
    owners = np.empty(len(labels), dtype=np.int64)
    owners[shuffled_by_class(rng, labels)] = owners_by_class
    return Partition.from_owners(owners, num_clients)


def shuffled_by_class(rng: np.random.Generator, labels: Integers) -> Integers:
    """List all sample indices ``[samples]``, sorted by label and in random order within a label."""
    order = rng.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]

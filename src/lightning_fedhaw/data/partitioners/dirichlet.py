"""Label skew from Dirichlet distributions.

Shapes: K clients, C classes that occur in the data (in ascending order of label), counts ``[K, C]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_fedhaw import arguments
from lightning_fedhaw.data.partitioners.base import Partitioner
from lightning_fedhaw.data.partitioners.counts import (
    OnInfeasible,
    assign_samples,
    concentration,
    count_classes,
    dirichlet,
    equal_sizes,
    generator,
    largest_remainder,
    redraw,
    smaller_limit,
    smallest_allowed,
)
from lightning_fedhaw.data.partitioners.partition import Integers, Partition

DirichletKind = Literal["balanced", "unbalanced", "client"]


# ---------------------------------------------------------------------------------------------------------------------
# One data set, one distribution
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DirichletPartitioner(Partitioner):
    """Label skew from a Dirichlet distribution, in its three common readings.

    - ``"balanced"``: each class is cut by Dir(alpha) over the clients, clients that have their equal share get nothing
      more, and all is redrawn until each client has ``min_size`` samples. It is ``hetero-dir`` of Wang et al. 2020
      ("Federated Learning with Matched Averaging"), as in FedLab and PFLlib. Sizes still vary, often tenfold.
    - ``"unbalanced"``: the same without the cap, rounded to largest remainders; FedLAW's split (Li et al. 2023).
    - ``"client"``: each client draws a class prior from Dir(alpha), and the number of its samples is given; Hsu et
      al. 2019 ("Measuring the Effects of Non-Identical Data Distribution"), FedDyn (Acar et al. 2021).

    Attributes:
        alpha: Concentration, positive: 0.1 is strong skew, 100 nearly IID.
        kind: Which of the three.
        min_size: Samples that every client must get, at least 1; not for ``"client"``. Default: 10, the value of Wang
            et al., but no more than half of an equal share, and at least 1.
        max_tries: Draws before giving up on ``min_size``.
        on_infeasible: What giving up means. ``"raise"``: an error. ``"move"``: a warning, and samples move from the
            largest clients to the smallest.
        sizes: Samples of each client for ``"client"``, ``[K]``; what they leave over is dropped. Default: equal parts
            of the data set. ``QuantitySkewPartitioner(..).sizes(..)`` gives both skews at once.

    Raises:
        ValueError: If an argument is out of range, or fits another ``kind``.
    """

    alpha: float
    kind: DirichletKind = "balanced"
    min_size: int | None = None
    max_tries: int = 1000
    on_infeasible: OnInfeasible = "raise"
    sizes: Sequence[int] | None = None
    needs_labels = True

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
        if self.kind == "client" and self.min_size is not None:
            raise ValueError(f'`min_size` must be None for kind="client", got {self.min_size}; give `sizes` instead.')
        if self.kind != "client" and self.sizes is not None:
            raise ValueError(f'`sizes` must be None for kind="{self.kind}", got {self.sizes!r}; use kind="client".')

    def _checked(self) -> dict[str, Any]:
        sizes = arguments.optional(
            arguments.integers, "sizes", self.sizes, minimum=1, allowed="whole numbers of at least 1, one per client"
        )
        return {
            "alpha": concentration("alpha", self.alpha),
            "kind": arguments.choice("kind", self.kind, DirichletKind),
            "min_size": arguments.optional(arguments.integer, "min_size", self.min_size, minimum=1),
            "max_tries": arguments.integer("max_tries", self.max_tries, minimum=1),
            "on_infeasible": arguments.choice("on_infeasible", self.on_infeasible, OnInfeasible),
            "sizes": None if sizes is None else tuple(sizes),
        }

    def split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """Draw the counts of the chosen kind, and assign samples by them."""
        rng = generator(seed, "dirichlet", self.kind)
        per_class = count_classes(labels)
        if self.kind == "client":
            sizes = self._client_sizes(num_clients, len(labels))
            return assign_samples(rng, labels, clientwise_counts(rng, per_class, sizes, self.alpha))

        def draw() -> Integers:
            if self.kind == "balanced":
                return balanced_counts(rng, per_class, num_clients, self.alpha)
            return unbalanced_counts(rng, per_class, num_clients, self.alpha)

        least = smallest_allowed(self.min_size, num_clients, len(labels))
        call = f"DirichletPartitioner({self.alpha:g}"
        if self.kind != "balanced":
            call += f', "{self.kind}"'
        counts = redraw(
            draw,
            least,
            self.max_tries,
            self.on_infeasible,
            scheme=f"A Dirichlet split with `alpha`={self.alpha:g}",
            remedies=[
                "a larger `alpha`",
                *smaller_limit(least, call),
                f'moved samples (`partitioner={call}, on_infeasible="move")`)',
            ],
        )
        return assign_samples(rng, labels, counts)

    def _client_sizes(self, num_clients: int, num_samples: int) -> Integers:
        """Return the samples of each client, ``[K]``, for the kind whose clients have given sizes."""
        if self.sizes is None:
            return equal_sizes(num_clients, num_samples)
        if len(self.sizes) != num_clients or sum(self.sizes) > num_samples:
            raise ValueError(
                f"`sizes` must be {num_clients} numbers, one per client, of sum at most {num_samples}, the samples"
                f" there are, got {len(self.sizes)} of sum {sum(self.sizes)}."
            )
        return np.asarray(self.sizes, dtype=np.int64)


def balanced_counts(rng: np.random.Generator, class_sizes: Integers, num_clients: int, alpha: float) -> Integers:
    """Draw once the label-wise Dirichlet split with a balance cap, clients of any size.

    Each class is cut by proportions from Dir(alpha) over the clients, among those that hold less than their equal
    share so far. The cap is tested before a class is added, so a client may still end above it.

    Args:
        rng: The generator of the draw.
        class_sizes: Samples of each class, ``[C]``.
        num_clients: K.
        alpha: Concentration; small is skewed.

    Returns:
        Counts ``[K, C]``, whose columns sum to ``class_sizes``.
    """
    cap = class_sizes.sum() / num_clients
    counts = np.zeros((num_clients, len(class_sizes)), dtype=np.int64)
    for c, size in enumerate(class_sizes):
        is_open = counts.sum(axis=1) < cap
        shares = dirichlet(rng, alpha, num_clients) * is_open
        if shares.sum() == 0:
            # With a tiny alpha all the mass may lie on clients that are full.
            shares = is_open.astype(np.float64)
        cuts = np.floor(np.cumsum(shares / shares.sum())[:-1] * size).astype(np.int64)
        counts[:, c] = np.diff(cuts, prepend=0, append=size)
    return counts


def unbalanced_counts(rng: np.random.Generator, class_sizes: Integers, num_clients: int, alpha: float) -> Integers:
    """Draw once the label-wise Dirichlet split without balancing: each class is divided by a new draw from Dir(alpha).

    Args:
        rng: The generator of the draw.
        class_sizes: Samples of each class, ``[C]``.
        num_clients: K.
        alpha: Concentration; small is skewed, in labels and in sizes.

    Returns:
        Counts ``[K, C]``, whose columns sum to ``class_sizes``.
    """
    shares = np.stack([dirichlet(rng, alpha, num_clients) for _ in class_sizes], axis=1)  # [K, C]
    return _rounded(shares, class_sizes)


def clientwise_counts(rng: np.random.Generator, class_sizes: Integers, sizes: Integers, alpha: float) -> Integers:
    """Draw the client-wise Dirichlet split: client k gets ``sizes[k]`` samples by a class prior from Dir(alpha).

    All clients draw at the same time. If more samples of a class are requested than it has, a random part of the
    requests is served, and the others are drawn again among the classes that still have samples.

    Args:
        rng: The generator of the draw.
        class_sizes: Samples of each class, ``[C]``.
        sizes: Samples of each client, ``[K]``; at most ``class_sizes.sum()`` together.
        alpha: Concentration of the priors over classes; small is skewed.

    Returns:
        Counts ``[K, C]``, whose rows sum to ``sizes``.
    """
    priors = np.stack([dirichlet(rng, alpha, len(class_sizes)) for _ in sizes])  # [K, C]
    counts = np.zeros(priors.shape, dtype=np.int64)
    available = class_sizes.copy()  # [C]
    missing = sizes.copy()  # [K]
    while missing.any():
        shares = priors * (available > 0)
        # A prior all of whose classes are used up.
        shares[shares.sum(axis=1) == 0] = available > 0
        requests = rng.multinomial(missing, shares / shares.sum(axis=1, keepdims=True))  # [K, C]
        for c in np.flatnonzero(requests.sum(axis=0) > available):
            requests[:, c] = rng.multivariate_hypergeometric(requests[:, c], available[c])
        counts += requests
        available -= requests.sum(axis=0)
        missing -= requests.sum(axis=1)
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Balanced and skewed clients in one federation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HybridDirichletPartitioner(Partitioner):
    """Balanced and skewed clients in one federation; FedLAW (Li et al. 2023, "Revisiting Weighted Aggregation").

    For each class Dir(``alpha_balanced``) is drawn over all clients and the first half keeps its shares; the second
    half divides the remainder by Dir(``alpha_skewed``).

    Attributes:
        alpha_balanced: Concentration for clients 0 .. K/2 - 1, positive.
        alpha_skewed: Concentration for clients K/2 .. K - 1, positive.
        min_size: As for :class:`DirichletPartitioner`.
        max_tries: Draws before ``min_size`` is given up with an error.

    Raises:
        ValueError: If an argument is out of range; in ``partition``, if the number of clients is odd.
    """

    alpha_balanced: float = 10.0
    alpha_skewed: float = 0.1
    min_size: int | None = None
    max_tries: int = 1000
    needs_labels = True

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)

    def _checked(self) -> dict[str, Any]:
        return {
            "alpha_balanced": concentration("alpha_balanced", self.alpha_balanced),
            "alpha_skewed": concentration("alpha_skewed", self.alpha_skewed),
            "min_size": arguments.optional(arguments.integer, "min_size", self.min_size, minimum=1),
            "max_tries": arguments.integer("max_tries", self.max_tries, minimum=1),
        }

    def split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """Draw the counts of both halves, and assign samples by them."""
        if num_clients % 2:
            raise ValueError(f"`num_clients` must be even for HybridDirichletPartitioner, got {num_clients}.")
        rng = generator(seed, "hybrid-dirichlet")
        per_class = count_classes(labels)

        def draw() -> Integers:
            return hybrid_counts(rng, per_class, num_clients, self.alpha_balanced, self.alpha_skewed)

        least = smallest_allowed(self.min_size, num_clients, len(labels))
        settings = f"{self.alpha_balanced:g}, {self.alpha_skewed:g}"
        counts = redraw(
            draw,
            least,
            self.max_tries,
            "raise",
            scheme=f"A hybrid Dirichlet split with `alpha_skewed`={self.alpha_skewed:g}",
            remedies=["a larger `alpha_skewed`", *smaller_limit(least, f"HybridDirichletPartitioner({settings}")],
        )
        return assign_samples(rng, labels, counts)


def hybrid_counts(
    rng: np.random.Generator, class_sizes: Integers, num_clients: int, alpha_balanced: float, alpha_skewed: float
) -> Integers:
    """Draw once the hybrid Dirichlet split: the first half of the clients balanced, the second half skewed.

    Args:
        rng: The generator of the draw.
        class_sizes: Samples of each class, ``[C]``.
        num_clients: K, even.
        alpha_balanced: Concentration from which all K shares of a class are drawn; the first half keeps them.
        alpha_skewed: Concentration by which the second half divides the remainder of a class.

    Returns:
        Counts ``[K, C]``, whose columns sum to ``class_sizes``.
    """
    half = num_clients // 2
    shares = np.stack([dirichlet(rng, alpha_balanced, num_clients) for _ in class_sizes], axis=1)  # [K, C]
    remainder = np.maximum(1.0 - shares[:half].sum(axis=0), 0.0)  # [C]; the sum may round to just above one
    shares[half:] = remainder * np.stack([dirichlet(rng, alpha_skewed, half) for _ in class_sizes], axis=1)
    return _rounded(shares, class_sizes)


def _rounded(shares: NDArray[np.float64], class_sizes: Integers) -> Integers:
    """Round the clients' shares ``[K, C]`` of each class to counts that sum to the class."""
    counts = np.zeros(shares.shape, dtype=np.int64)
    for c, size in enumerate(class_sizes):
        counts[:, c] = largest_remainder(shares[:, c], int(size))
    return counts

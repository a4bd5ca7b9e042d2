"""Who owns which sample: ways to split one data set over clients.

A scheme is a :class:`Partitioner`; what it returns is a :class:`Partition`. The label-skewed schemes first decide *how
many* samples of each class each client gets, a table of counts made by a function below, and then deal the shuffled
samples out. Every draw comes from a generator addressed by the seed and the scheme's name.

Shapes: K clients, C classes that occur in the data (in ascending order of label), counts ``[K, C]``.
"""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, isfinite
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_fedhaw.options import check_choice, check_whole, is_number
from lightning_fedhaw.streams import seed_of

Integers = NDArray[np.int64]
DirichletKind = Literal["balanced", "unbalanced", "client"]
OnInfeasible = Literal["raise", "move"]


@dataclass(frozen=True, eq=False)
class Partition:
    """One split of a data set; compare two by their :meth:`fingerprint`.

    Attributes:
        indices: For each client the int64 indices ``[n_k]`` of its samples; sorted ascending on construction.
        dropped: Samples that belong to nobody because the scheme leaves some out by definition.
        label_swaps: Client -> the two labels that change places in its training data.
    """

    indices: tuple[Tensor, ...]
    dropped: int = 0
    label_swaps: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Sorting also copies: a slice of a shared array would take the whole array along when it is pickled.
        indices = (torch.as_tensor(i, dtype=torch.int64).sort().values for i in self.indices)
        object.__setattr__(self, "indices", tuple(indices))

    @classmethod
    def from_owners(cls, owners: Integers, num_clients: int) -> Partition:
        """The partition in which sample i belongs to client ``owners[i]``, or to nobody where that is -1.

        Args:
            owners: ``[samples]``, entries in ``-1 .. num_clients - 1``.
            num_clients: K.
        """
        by_owner = np.argsort(owners, kind="stable")
        counts = np.bincount(owners + 1, minlength=num_clients + 1)
        nobody, *indices = np.split(by_owner, np.cumsum(counts)[:-1])
        return cls(tuple(torch.from_numpy(i) for i in indices), dropped=len(nobody))

    @property
    def sizes(self) -> Tensor:
        """Samples of each client, int64 ``[K]``."""
        return torch.tensor([len(i) for i in self.indices], dtype=torch.int64)

    def histogram(self, labels: Tensor, num_classes: int | None = None) -> Tensor:
        """Samples of each client in each class, label swaps applied.

        Args:
            labels: Labels of the whole data set before any swap, non-negative integers ``[samples]``.
            num_classes: C, the width of the table. Default: one more than the largest label.

        Returns:
            Counts, int64 ``[K, C]``.

        Raises:
            ValueError: If a label is negative or not below ``num_classes``.
        """
        labels = torch.as_tensor(labels, dtype=torch.int64, device="cpu")
        largest = max([int(labels.max()), *(max(pair) for pair in self.label_swaps.values())])
        width = largest + 1 if num_classes is None else num_classes
        if labels.min() < 0 or largest >= width:
            raise ValueError(
                f"`labels` must lie in 0 .. {width - 1}, got values from {int(labels.min())} to {largest};"
                " renumber them or give a larger `num_classes`."
            )
        rows = []
        for client, chosen in enumerate(self.indices):
            own = labels[chosen]
            if client in self.label_swaps:
                own = swap_labels(own, self.label_swaps[client])
            rows.append(torch.bincount(own, minlength=width))
        return torch.stack(rows)

    def fingerprint(self) -> str:
        """Sixteen hex digits that depend on who owns what and on the swaps alone; the same on every machine."""
        digest = hashlib.blake2b(digest_size=8)
        for chosen in self.indices:
            digest.update(len(chosen).to_bytes(8, "little") + chosen.numpy().astype("<i8").tobytes())
        digest.update(repr([(k, *self.label_swaps[k]) for k in sorted(self.label_swaps)]).encode())
        return digest.hexdigest()


class Partitioner(ABC):
    """A scheme that splits the samples of one data set over clients.

    A subclass writes :meth:`_split`; the base checks what goes in and what comes out.

    Attributes:
        needs_labels: Whether the scheme looks at labels.
    """

    needs_labels: bool = False

    @property
    def num_clients(self) -> int | None:
        """The number of clients that the scheme dictates; None if any will do."""
        return None

    def partition(
        self, num_clients: int | None, *, num_samples: int, labels: Tensor | None = None, seed: int = 0
    ) -> Partition:
        """Split ``num_samples`` samples over ``num_clients`` clients.

        Args:
            num_clients: K. May be None where the scheme dictates it.
            num_samples: Samples in the data set.
            labels: Integer labels ``[num_samples]``; only looked at by schemes with ``needs_labels``.
            seed: The federation's seed. The same seed gives the same partition.

        Returns:
            The partition: no sample twice, no client without data, and no sample lost that is not in ``dropped``.

        Raises:
            TypeError: If labels are needed and are not integers.
            ValueError: If the arguments do not fit each other, or the scheme leaves a client without data.
        """
        clients = self._resolve(num_clients)
        check_whole("num_samples", num_samples, 1)
        if num_samples < clients:
            raise ValueError(
                f"`num_clients` must be at most the number of samples, {num_samples}, got {clients}; use fewer clients."
            )
        partition = self._split(clients, self._labels(labels, num_samples), seed)
        _check(partition, clients, num_samples, type(self).__name__)
        return partition

    @abstractmethod
    def _split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        """The scheme itself.

        Args:
            num_clients: K, at least 1 and at most the number of samples.
            labels: ``[samples]``; all zero, that is one class, where the scheme does not need labels.
            seed: The federation's seed.
        """

    def _resolve(self, num_clients: int | None) -> int:
        own, name = self.num_clients, type(self).__name__
        if num_clients is None:
            if own is None:
                raise ValueError(f"`num_clients` must be given for {name}, got None; give a whole number, such as 10.")
            return own
        check_whole("num_clients", num_clients, 1)
        if own is not None and own != num_clients:
            raise ValueError(f"`num_clients` must be {own}, which {name} dictates, or None, got {num_clients}.")
        return num_clients

    def _labels(self, labels: Tensor | None, num_samples: int) -> Integers:
        name = type(self).__name__
        if labels is None and self.needs_labels:
            raise ValueError(
                f"`labels` must be given for {name}, got None (no integer class labels were found in the data set);"
                " give the labels of all samples, or split without labels: leave `alpha` out, or use"
                " `IIDPartitioner()`."
            )
        if labels is not None and len(labels) != num_samples:
            raise ValueError(f"`labels` must have one entry per sample ({num_samples}), got {len(labels)}.")
        if labels is None or not self.needs_labels:
            return np.zeros(num_samples, dtype=np.int64)
        return _integer_labels(labels)


def _check(partition: Partition, num_clients: int, num_samples: int, scheme: str) -> None:
    if len(partition.indices) != num_clients:
        raise ValueError(
            f"`indices` of a partition by {scheme} must have one entry per client ({num_clients}), got"
            f" {len(partition.indices)}."
        )
    empty = [k for k, size in enumerate(partition.sizes.tolist()) if size == 0]
    if empty:
        raise ValueError(
            f"`indices` of a partition by {scheme} must give every client a sample, got none for client(s)"
            f" {', '.join(map(str, empty))}; use fewer clients or a less skewed split."
        )
    used = torch.cat(partition.indices)
    if used.min() < 0 or used.max() >= num_samples:
        raise ValueError(
            f"`indices` of a partition by {scheme} must lie in 0 .. {num_samples - 1}, got {int(used.min())} to"
            f" {int(used.max())}."
        )
    times = used.bincount()
    if times.max() > 1:
        raise ValueError(
            f"`indices` of a partition by {scheme} must use each sample at most once, got sample {int(times.argmax())}"
            f" {int(times.max())} times."
        )
    if len(used) + partition.dropped != num_samples:
        raise ValueError(
            f"`indices` and `dropped` of a partition by {scheme} must account for all {num_samples} samples, got"
            f" {len(used)} used and {partition.dropped} dropped."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Counts: how many samples of each class each client gets
# ---------------------------------------------------------------------------------------------------------------------


def largest_remainder(fractions: ArrayLike, total: int) -> Integers:
    """Whole numbers in the given proportions that sum to ``total`` (Hamilton's method).

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
    check_whole("total", total, 0)
    weights = np.asarray(fractions, dtype=np.float64)
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"`fractions` must be non-negative finite numbers, not all zero, got {fractions!r}.")
    exact = weights / weights.sum() * total
    counts: Integers = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def long_tail_counts(class_counts: ArrayLike, rho: float) -> Integers:
    """Class sizes that fall off exponentially: class c of C keeps ``floor(n_c * rho ** (-c / (C - 1)))``.

    The truncation of long-tailed CIFAR (Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples"),
    used by FedLAW (Li et al. 2023).

    Args:
        class_counts: Samples n_c of each class, ``[C]``.
        rho: How many times larger the first class becomes than the last where all were equal; at least 1.

    Returns:
        Samples that each class keeps, ``[C]``.

    Raises:
        ValueError: If ``rho`` is less than 1 or not finite.

    Example:
        >>> long_tail_counts([5000] * 5, 10).tolist()
        [5000, 2811, 1581, 889, 500]
    """
    _at_least_one("rho", rho)
    full = np.asarray(class_counts, dtype=np.int64)
    kept = full * float(rho) ** (-np.arange(len(full)) / max(len(full) - 1, 1))
    # The slack is for products that round to just below a whole number: 49 * 49 ** -1.0 is 0.99..
    counts: Integers = np.floor(kept * (1 + 1e-12)).astype(np.int64)
    return counts


def balanced_counts(rng: np.random.Generator, class_sizes: Integers, num_clients: int, alpha: float) -> Integers:
    """One draw of the label-wise Dirichlet split with a balance cap, clients of any size.

    Each class is cut by proportions from Dir(alpha) over the clients, among those that hold less than their equal
    share so far. The cap is looked at before a class is added, so a client may still end above it.

    Args:
        rng: Where the draw comes from.
        class_sizes: Samples of each class, ``[C]``.
        num_clients: K.
        alpha: Concentration; small is skewed.

    Returns:
        Counts ``[K, C]``, whose columns sum to ``class_sizes``.
    """
    cap = class_sizes.sum() / num_clients
    counts = np.zeros((num_clients, len(class_sizes)), dtype=np.int64)
    for c, size in enumerate(class_sizes):
        open_ = counts.sum(axis=1) < cap
        shares = _dirichlet(rng, alpha, num_clients) * open_
        # With a tiny alpha all the mass may lie on clients that are full.
        shares = shares if shares.sum() > 0 else open_.astype(np.float64)
        cuts = np.floor(np.cumsum(shares / shares.sum())[:-1] * size).astype(np.int64)
        counts[:, c] = np.diff(cuts, prepend=0, append=size)
    return counts


def unbalanced_counts(rng: np.random.Generator, class_sizes: Integers, num_clients: int, alpha: float) -> Integers:
    """One draw of the label-wise Dirichlet split without balancing: class c is shared out by its own Dir(alpha).

    Args:
        rng: Where the draw comes from.
        class_sizes: Samples of each class, ``[C]``.
        num_clients: K.
        alpha: Concentration; small is skewed, in labels and in sizes.

    Returns:
        Counts ``[K, C]``, whose columns sum to ``class_sizes``.
    """
    shares = np.stack([_dirichlet(rng, alpha, num_clients) for _ in class_sizes], axis=1)  # [K, C]
    return _rounded(shares, class_sizes)


def clientwise_counts(rng: np.random.Generator, class_sizes: Integers, sizes: Integers, alpha: float) -> Integers:
    """The client-wise Dirichlet split: client k fills its ``sizes[k]`` samples by its own class prior from Dir(alpha).

    All clients draw at the same time. Where a class is asked for more often than it has samples, the requests are
    served in random order, and the others are made again among the classes that are left.

    Args:
        rng: Where the draw comes from.
        class_sizes: Samples of each class, ``[C]``.
        sizes: Samples of each client, ``[K]``; at most ``class_sizes.sum()`` together.
        alpha: Concentration of the priors over classes; small is skewed.

    Returns:
        Counts ``[K, C]``, whose rows sum to ``sizes``.
    """
    priors = np.stack([_dirichlet(rng, alpha, len(class_sizes)) for _ in sizes])  # [K, C]
    counts = np.zeros(priors.shape, dtype=np.int64)
    left, wanted = class_sizes.copy(), sizes.copy()
    while wanted.any():
        shares = priors * (left > 0)
        shares[shares.sum(axis=1) == 0] = left > 0  # a prior all of whose classes are used up
        requests = rng.multinomial(wanted, shares / shares.sum(axis=1, keepdims=True))  # [K, C]
        for c in np.flatnonzero(requests.sum(axis=0) > left):
            requests[:, c] = rng.multivariate_hypergeometric(requests[:, c], left[c])
        counts += requests
        left -= requests.sum(axis=0)
        wanted -= requests.sum(axis=1)
    return counts


def hybrid_counts(
    rng: np.random.Generator, class_sizes: Integers, num_clients: int, alpha_balanced: float, alpha_skewed: float
) -> Integers:
    """One draw of the hybrid Dirichlet split: the first half of the clients balanced, the second half skewed.

    Args:
        rng: Where the draw comes from.
        class_sizes: Samples of each class, ``[C]``.
        num_clients: K, even.
        alpha_balanced: Concentration from which all K shares of a class are drawn; the first half keeps them.
        alpha_skewed: Concentration by which the second half shares what the first leaves of a class.

    Returns:
        Counts ``[K, C]``, whose columns sum to ``class_sizes``.
    """
    half = num_clients // 2
    shares = np.stack([_dirichlet(rng, alpha_balanced, num_clients) for _ in class_sizes], axis=1)  # [K, C]
    rest = np.maximum(1.0 - shares[:half].sum(axis=0), 0.0)  # [C]; the sum may round to just above one
    shares[half:] = rest * np.stack([_dirichlet(rng, alpha_skewed, half) for _ in class_sizes], axis=1)
    return _rounded(shares, class_sizes)


def _rounded(shares: NDArray[np.float64], class_sizes: Integers) -> Integers:
    return np.stack([largest_remainder(s, int(n)) for s, n in zip(shares.T, class_sizes, strict=True)], axis=1)


def _dirichlet(rng: np.random.Generator, alpha: float, size: int) -> NDArray[np.float64]:
    """Proportions ``[size]`` from Dir(alpha, .., alpha), also where floating point gives up on alpha."""
    shares = rng.dirichlet(np.full(size, alpha))
    if abs(shares.sum() - 1.0) < 1e-6:
        return shares
    # NaN or all zero: what the distribution tends to, one corner for a tiny alpha and the centre for a huge one.
    return np.eye(size)[rng.integers(size)] if alpha < 1 else np.full(size, 1 / size)


def _least(min_size: int | None, num_clients: int, num_samples: int) -> int:
    """The smallest client size to insist on."""
    least = max(1, min(10, num_samples // num_clients // 2)) if min_size is None else min_size
    if least * num_clients > num_samples:
        raise ValueError(
            f"`min_size` must be at most the mean client size {num_samples / num_clients:g} ({num_samples} samples,"
            f" {num_clients} clients), got {least}."
        )
    return least


def _redraw(draw: Callable[[], Integers], least: int, max_tries: int, on_infeasible: OnInfeasible) -> Integers:
    """Draw counts ``[K, C]``, all of them anew each time, until every client has ``least`` samples."""
    for _ in range(max_tries):
        counts = draw()
        smallest = int(counts.sum(axis=1).min())
        if smallest >= least:
            return counts
    if on_infeasible == "raise":
        raise ValueError(
            f"`min_size` must be reached by every client, and in {max_tries} tries no draw gave all {len(counts)}"
            f" clients {least} samples (the last gave one {smallest}); use a less skewed split, fewer clients, a"
            ' smaller `min_size`, or, with `DirichletPartitioner`, `on_infeasible="move"`.'
        )
    warnings.warn(
        f"No draw in {max_tries} tries gave all {len(counts)} clients `min_size`={least} samples; samples were moved"
        " from the largest clients to the smallest.",
        stacklevel=4,  # the caller of Partitioner.partition
    )
    return _top_up(counts, least)


def _top_up(counts: Integers, least: int) -> Integers:
    """Move samples from the largest client to the smallest until every client has ``least``."""
    counts = counts.copy()
    while (sizes := counts.sum(axis=1)).min() < least:
        poor, rich = sizes.argmin(), sizes.argmax()
        c = counts[rich].argmax()
        # Only what the rich one can spare; it can, since `least` is at most the mean, so that the loop ends.
        moved = min(least - sizes[poor], sizes[rich] - least, counts[rich, c])
        counts[rich, c] -= moved
        counts[poor, c] += moved
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Schemes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IIDPartitioner(Partitioner):
    """A random split into equal parts; sizes differ by one at most."""

    def _split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        return _deal(_rng(seed, "iid"), labels, _equal_sizes(num_clients, len(labels))[:, None])


@dataclass(frozen=True)
class DirichletPartitioner(Partitioner):
    """Label skew from a Dirichlet distribution, in its three common readings.

    - ``"balanced"``: each class is cut by Dir(alpha) over the clients, clients that have their equal share get nothing
      more, and all is redrawn until everyone has ``min_size`` samples. The ``hetero-dir`` scheme of Wang et al. 2020
      ("Federated Learning with Matched Averaging"), as in FedLab and PFLlib. Sizes still vary, often tenfold.
    - ``"unbalanced"``: the same without the cap, rounded to largest remainders; FedLAW's split (Li et al. 2023).
    - ``"client"``: each client draws its own class prior from Dir(alpha) and fills a given number of samples; Hsu et
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
            of everything. ``QuantitySkewPartitioner(..).sizes(..)`` gives both skews at once.

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
        _positive("alpha", self.alpha)
        check_choice("kind", self.kind, get_args(DirichletKind))
        check_choice("on_infeasible", self.on_infeasible, get_args(OnInfeasible))
        check_whole("max_tries", self.max_tries, 1)
        if self.min_size is not None:
            check_whole("min_size", self.min_size, 1)
        if self.kind == "client" and self.min_size is not None:
            raise ValueError(f'`min_size` must be None for kind="client", got {self.min_size}; give `sizes` instead.')
        if self.sizes is not None:
            if self.kind != "client":
                raise ValueError(f'`sizes` must be None for kind="{self.kind}", got {self.sizes!r}; use kind="client".')
            object.__setattr__(self, "sizes", tuple(_listed(self.sizes)))
            for size in self.sizes:
                check_whole("sizes", size, 1)

    def _split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        rng, class_sizes = _rng(seed, "dirichlet", self.kind), _class_sizes(labels)
        if self.kind == "client":
            counts = clientwise_counts(rng, class_sizes, self._sizes(num_clients, len(labels)), self.alpha)
        else:
            one_draw = balanced_counts if self.kind == "balanced" else unbalanced_counts
            counts = _redraw(
                lambda: one_draw(rng, class_sizes, num_clients, self.alpha),
                _least(self.min_size, num_clients, len(labels)),
                self.max_tries,
                self.on_infeasible,
            )
        return _deal(rng, labels, counts)

    def _sizes(self, num_clients: int, num_samples: int) -> Integers:
        if self.sizes is None:
            return _equal_sizes(num_clients, num_samples)
        if len(self.sizes) != num_clients or sum(self.sizes) > num_samples:
            raise ValueError(
                f"`sizes` must be {num_clients} numbers, one per client, of sum at most {num_samples}, the samples"
                f" there are, got {len(self.sizes)} of sum {sum(self.sizes)}."
            )
        return np.asarray(self.sizes, dtype=np.int64)


@dataclass(frozen=True)
class HybridDirichletPartitioner(Partitioner):
    """Balanced and skewed clients in one federation; FedLAW (Li et al. 2023, "Revisiting Weighted Aggregation").

    For each class Dir(``alpha_balanced``) is drawn over all clients and the first half keeps its shares; the second
    half divides what is left by Dir(``alpha_skewed``).

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
        _positive("alpha_balanced", self.alpha_balanced)
        _positive("alpha_skewed", self.alpha_skewed)
        check_whole("max_tries", self.max_tries, 1)
        if self.min_size is not None:
            check_whole("min_size", self.min_size, 1)

    def _split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        if num_clients % 2:
            raise ValueError(f"`num_clients` must be even for HybridDirichletPartitioner, got {num_clients}.")
        rng, class_sizes = _rng(seed, "hybrid-dirichlet"), _class_sizes(labels)
        counts = _redraw(
            lambda: hybrid_counts(rng, class_sizes, num_clients, self.alpha_balanced, self.alpha_skewed),
            _least(self.min_size, num_clients, len(labels)),
            self.max_tries,
            "raise",
        )
        return _deal(rng, labels, counts)


@dataclass(frozen=True)
class ShardPartitioner(Partitioner):
    """A few shards of label-sorted data per client, so that most clients see few labels; McMahan et al. 2017 (FedAvg).

    MNIST's classic is 100 clients with 2 shards of 300. Left-over samples are dropped and counted.

    Attributes:
        shards_per_client: Shards that each client gets.
        shard_size: Samples in a shard. Default: as many as there are samples for.

    Raises:
        ValueError: If an argument is not a positive whole number; in ``partition``, if there are too few samples.
    """

    shards_per_client: int = 2
    shard_size: int | None = None
    needs_labels = True

    def __post_init__(self) -> None:
        check_whole("shards_per_client", self.shards_per_client, 1)
        if self.shard_size is not None:
            check_whole("shard_size", self.shard_size, 1)

    def _split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
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
        rng = _rng(seed, "shards")
        order = _shuffled_by_class(rng, labels)
        takers = np.full(available, -1)
        takers[rng.permutation(available)[:needed]] = np.repeat(np.arange(num_clients), self.shards_per_client)
        owners = np.full(len(labels), -1)
        owners[order[: available * size]] = np.repeat(takers, size)
        return Partition.from_owners(owners, num_clients)


@dataclass(frozen=True)
class QuantitySkewPartitioner(Partitioner):
    """Clients of different size, each with a random sample of the data.

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
        if self.sigma is not None and not (is_number(self.sigma) and 0 <= self.sigma < float("inf")):
            raise ValueError(f"`sigma` must be a number of at least 0 (0 is equal sizes), got {self.sigma!r}.")
        if self.alpha is not None:
            _positive("alpha", self.alpha)
        check_whole("max_tries", self.max_tries, 1)
        if self.min_size is not None:
            check_whole("min_size", self.min_size, 1)

    def sizes(self, num_clients: int, num_samples: int, seed: int = 0) -> list[int]:
        """Samples of each client, ``[K]`` of sum ``num_samples``."""
        check_whole("num_clients", num_clients, 1)
        check_whole("num_samples", num_samples, num_clients)
        rng = _rng(seed, "quantity-skew", "sizes")
        counts = _redraw(
            lambda: largest_remainder(self._shares(rng, num_clients), num_samples)[:, None],  # [K, 1]
            _least(self.min_size, num_clients, num_samples),
            self.max_tries,
            "raise",
        )
        return [int(size) for size in counts[:, 0]]

    def _shares(self, rng: np.random.Generator, num_clients: int) -> NDArray[np.float64]:
        if self.alpha is not None:
            return _dirichlet(rng, self.alpha, num_clients)
        logs = (1.0 if self.sigma is None else self.sigma) * rng.standard_normal(num_clients)
        shares: NDArray[np.float64] = np.exp(logs - logs.max())  # the scale is free, and must not overflow
        return shares

    def _split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        counts = np.array(self.sizes(num_clients, len(labels), seed))[:, None]
        return _deal(_rng(seed, "quantity-skew"), labels, counts)


@dataclass(frozen=True)
class LongTailPartitioner(Partitioner):
    """Class imbalance in the whole federation: classes are cut by :func:`long_tail_counts`, then ``base`` splits.

    FedLAW (Li et al. 2023) takes ``DirichletPartitioner(alpha, "unbalanced")`` as the base. What is cut away is
    dropped and counted.

    Attributes:
        rho: Largest class over smallest, at least 1; classes fall off in ascending order of label.
        base: Splits what is left.

    Raises:
        TypeError: If ``base`` is not a partitioner.
        ValueError: If ``rho`` is below 1 or ``base`` is made for one data set; in ``partition``, if ``rho`` leaves a
            class without a sample.
    """

    rho: float
    base: Partitioner
    needs_labels = True

    def __post_init__(self) -> None:
        _at_least_one("rho", self.rho)
        _partitioner(self.base)
        if self.base.num_clients is not None:
            raise ValueError(
                f"`base` must be a scheme that can split any data set, got {type(self.base).__name__}, which is made"
                " for one; use, for example, `DirichletPartitioner(0.1)`."
            )

    def _split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        counts = long_tail_counts(_class_sizes(labels), self.rho)
        if counts.min() == 0:
            raise ValueError(
                f"`rho` must leave every class a sample, got {self.rho}, which leaves class"
                f" {np.unique(labels)[counts.argmin()]} none; use a smaller `rho`."
            )
        kept = _deal(_rng(seed, "long-tail"), labels, counts[None]).indices[0]
        inner = self.base.partition(
            num_clients, num_samples=len(kept), labels=torch.from_numpy(labels)[kept], seed=seed
        )
        dropped = len(labels) - len(kept) + inner.dropped
        return Partition(tuple(kept[i] for i in inner.indices), dropped, inner.label_swaps)


@dataclass(frozen=True)
class LabelSwap(Partitioner):
    """Corrupted clients: a share of the clients has two labels mixed up in its training data (FedLAW, Li et al. 2023).

    The split itself is the one that ``base`` makes with the same seed.

    Attributes:
        base: Splits the data.
        fraction: Share of the clients that are corrupted, in [0, 1], rounded to the nearest number, halves up.
        labels: The two labels that change places. Default: a pair drawn from the labels that occur.
        per_client: Whether each corrupted client draws its own pair.

    Raises:
        TypeError: If ``base`` is not a partitioner.
        ValueError: If an argument is out of range, or ``labels`` are given with ``per_client``; in ``partition``, if
            the labels do not occur, or ``base`` swaps labels already.
    """

    base: Partitioner
    fraction: float
    labels: tuple[int, int] | None = None
    per_client: bool = False
    needs_labels = True

    def __post_init__(self) -> None:
        _partitioner(self.base)
        if not (is_number(self.fraction) and 0 <= self.fraction <= 1):
            raise ValueError(f"`fraction` must be a share of the clients in [0, 1], got {self.fraction!r}.")
        if self.labels is None:
            return
        if self.per_client:
            raise ValueError(f"`labels` must be None with `per_client`, which draws a pair each, got {self.labels!r}.")
        pair = tuple(self.labels)
        if len(pair) != 2 or pair[0] == pair[1] or not all(type(label) is int for label in pair):
            raise ValueError(f"`labels` must be two different whole numbers, such as (1, 7), got {self.labels!r}.")
        object.__setattr__(self, "labels", pair)

    @property
    def num_clients(self) -> int | None:
        """The number of clients that ``base`` dictates, if it does."""
        return self.base.num_clients

    def _split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        occurring = np.unique(labels)
        if len(occurring) < 2 or not set(self.labels or ()) <= set(occurring.tolist()):
            raise ValueError(
                f"`labels` must be two that occur in the data, got {self.labels} where there are"
                f" {', '.join(map(str, occurring[:20]))}{' ..' if len(occurring) > 20 else ''}."
            )
        inner = self.base.partition(num_clients, num_samples=len(labels), labels=torch.from_numpy(labels), seed=seed)
        if inner.label_swaps:
            raise ValueError(f"`base` must not swap labels itself, got {self.base}; swap once.")
        rng = _rng(seed, "label-swap")
        corrupted = np.sort(rng.permutation(num_clients)[: floor(self.fraction * num_clients + 0.5)])
        if self.per_client:
            pairs = [_pair(rng, occurring) for _ in corrupted]
        else:
            pairs = [self.labels or _pair(rng, occurring)] * len(corrupted)
        return Partition(inner.indices, inner.dropped, dict(zip(corrupted.tolist(), pairs, strict=True)))


class KeyPartitioner(Partitioner):
    """One client for each distinct value of a key, such as the speaker or the hospital that a sample comes from.

    Args:
        keys: The key of every sample ``[samples]``: a sequence, array, tensor or column of hashable values.

    Attributes:
        names: The key of each client, in the order of first appearance.

    Raises:
        TypeError: If a key cannot be hashed.
        ValueError: If there are no keys or one is missing (None or NaN).
    """

    def __init__(self, keys: Iterable[Hashable]) -> None:
        if isinstance(keys, str):
            raise TypeError(f"`keys` must be the column of keys itself, one entry per sample, got the text {keys!r}.")
        values = _listed(keys)
        for sample, key in enumerate(values):
            if not isinstance(key, Hashable):
                raise TypeError(
                    f"`keys` must be one number, string or other hashable value per sample, got"
                    f" {type(key).__name__} for sample {sample}."
                )
            if key is None or key != key:
                raise ValueError(
                    f"`keys` must have a value for every sample, got {key} for sample {sample}; leave such samples out"
                    " or give them a key of their own."
                )
        if not values:
            raise ValueError("`keys` must have one entry per sample, got none.")
        client_of = {key: client for client, key in enumerate(dict.fromkeys(values))}
        self.names: tuple[Hashable, ...] = tuple(client_of)
        self._owners = np.array([client_of[key] for key in values], dtype=np.int64)

    @property
    def num_clients(self) -> int:
        """The number of distinct keys."""
        return len(self.names)

    def _split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        if len(self._owners) != len(labels):
            raise ValueError(f"`keys` must have one entry per sample ({len(labels)}), got {len(self._owners)}.")
        return Partition.from_owners(self._owners, num_clients)


class IndexPartitioner(Partitioner):
    """A split made elsewhere; samples that nobody is given are dropped and counted.

    Args:
        indices: For each client the indices of its samples.

    Raises:
        TypeError: If an index is not a whole number.
        ValueError: If there are no clients; in ``partition``, if an index is out of range or used twice.
    """

    def __init__(self, indices: Iterable[Iterable[int]]) -> None:
        lists = list(indices)
        if not all(isinstance(own, Iterable) for own in lists):
            raise TypeError(f"`indices` must be a list of lists, one per client, got {lists[:5]}.")
        given = [_listed(own) for own in lists]
        for client, own in enumerate(given):
            if not all(type(i) is int for i in own):
                raise TypeError(f"`indices` must be lists of whole numbers, got {own[:5]} .. for client {client}.")
        if not given:
            raise ValueError("`indices` must be one list of sample indices per client, got no client.")
        self._indices = tuple(torch.tensor(own, dtype=torch.int64) for own in given)

    @property
    def num_clients(self) -> int:
        """The number of index lists."""
        return len(self._indices)

    def _split(self, num_clients: int, labels: Integers, seed: int) -> Partition:
        return Partition(self._indices, dropped=len(labels) - sum(len(own) for own in self._indices))


# ---------------------------------------------------------------------------------------------------------------------
# Subsets and swaps
# ---------------------------------------------------------------------------------------------------------------------


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
    check_whole("total", total, 1)
    num_classes = len(_class_sizes(_integer_labels(labels)))
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
    values = _integer_labels(labels)
    wanted, sizes = np.asarray(counts, dtype=np.int64), _class_sizes(values)
    if wanted.shape != sizes.shape or wanted.min() < 0:
        raise ValueError(f"`counts` must be {len(sizes)} numbers of at least 0, one per class, got {counts!r}.")
    if (wanted > sizes).any():
        short = int(np.argmax(wanted - sizes))
        raise ValueError(
            f"`counts` must be at most what each class has, got {wanted[short]} for class {np.unique(values)[short]},"
            f" which has {sizes[short]} samples; take fewer in all."
        )
    chosen, rest = _deal(_rng(seed, "subset"), values, np.stack([wanted, sizes - wanted])).indices
    return chosen, rest


def swap_labels(labels: Tensor, pair: tuple[int, int]) -> Tensor:
    """The labels with the two of ``pair`` in each other's place; doing it twice restores them.

    Example:
        >>> swap_labels(torch.tensor([0, 1, 2, 1]), (1, 2)).tolist()
        [0, 2, 1, 2]
    """
    a, b = pair
    return torch.where(labels == a, b, torch.where(labels == b, a, labels))


# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def _rng(seed: int, *scheme: str) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, "partition", *scheme))


def _class_sizes(labels: Integers) -> Integers:
    return np.unique(labels, return_counts=True)[1].astype(np.int64)


def _equal_sizes(num_clients: int, num_samples: int) -> Integers:
    return largest_remainder(np.ones(num_clients), num_samples)


def _pair(rng: np.random.Generator, labels: Integers) -> tuple[int, int]:
    a, b = rng.choice(labels, size=2, replace=False).tolist()
    return a, b


def _shuffled_by_class(rng: np.random.Generator, labels: Integers) -> Integers:
    """All sample indices, sorted by label and in random order within a label."""
    order = rng.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


def _deal(rng: np.random.Generator, labels: Integers, counts: Integers) -> Partition:
    """Give client k ``counts[k, c]`` random samples of class c; what is left over belongs to nobody."""
    num_clients, num_classes = counts.shape
    table = np.vstack([counts, _class_sizes(labels) - counts.sum(axis=0)])  # [K + 1, C]
    takers = np.tile(np.append(np.arange(num_clients), -1), num_classes)
    owners = np.empty(len(labels), dtype=np.int64)
    owners[_shuffled_by_class(rng, labels)] = np.repeat(takers, table.T.ravel())
    return Partition.from_owners(owners, num_clients)


def _integer_labels(labels: Tensor) -> Integers:
    values = torch.as_tensor(labels)
    if values.ndim != 1 or values.is_floating_point() or values.is_complex():
        raise TypeError(
            f"`labels` must be integers of shape [samples], got {values.dtype} of shape {list(values.shape)}."
        )
    return values.cpu().numpy().astype(np.int64)


def _listed(values: Any) -> list[Any]:
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _partitioner(base: Any) -> None:
    if not isinstance(base, Partitioner):
        raise TypeError(f"`base` must be a `Partitioner`, such as `IIDPartitioner()`, got {base!r}.")


def _positive(name: str, value: Any) -> None:
    if not (is_number(value) and isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a positive number (0.1 is strong skew, 100 nearly none), got {value!r}.")


def _at_least_one(name: str, value: Any) -> None:
    if not (is_number(value) and isfinite(value) and value >= 1):
        raise ValueError(f"`{name}` must be a number of at least 1, got {value!r}.")

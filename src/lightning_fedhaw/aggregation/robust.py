"""Robust rules: what a few clients send, whatever it is, moves the model by little.

Coordinate median and trimmed mean: D. Yin, Y. Chen, K. Ramchandran, P. Bartlett: Byzantine-Robust Distributed
Learning: Towards Optimal Statistical Rates. ICML 2018. Krum and Multi-Krum: P. Blanchard, E. M. El Mhamdi,
R. Guerraoui, J. Stainer: Machine Learning with Adversaries. NeurIPS 2017. Geometric median: K. Pillutla, S. Kakade,
Z. Harchaoui: Robust Aggregation for Federated Learning. IEEE Transactions on Signal Processing, 2022.

Of K clients f may be wrong::

    trimmed mean       per coordinate: the mean without the f smallest and the f largest values          K >= 2 f + 1
    median             per coordinate: the middle value, or the mean of the two
    Krum               the client with the least sum of squared distances to its K - f - 2 nearest       K >= 2 f + 3
    Multi-Krum         the mean of the clients with the least such sums
    geometric median   argmin_v sum_k p_k |w_k - v|

The first four do not look at numbers of examples: a client that lies could name any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, normalized
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import RuleOutput, ServerView, State
from lightning_fedhaw.vectors.base import CohortVectors


def trimmed_mean(values: Tensor, cut: int) -> Tensor:
    """The mean of each column without its ``cut`` smallest and ``cut`` largest numbers: ``[K, columns] -> [columns]``.

    With ``cut = (K - 1) // 2`` it is the median. The columns are sorted in place.
    """
    many = len(values)
    # Odd-even transposition: whole rows are compared, which takes a fifth of the time of `sort` or less.
    for turn in range(many):
        low, high = values[turn % 2 : many - 1 : 2], values[turn % 2 + 1 :: 2]
        least = torch.minimum(low, high)
        torch.maximum(low, high, out=high)
        low.copy_(least)
    return values[cut : many - cut].mean(0)


def krum_scores(vectors: CohortVectors, num_byzantine: int) -> Tensor:
    """Sum of squared distances of each vector to its ``K - num_byzantine - 2`` nearest others, ``[K]`` float64."""
    products = vectors.gram()
    products = (products + products.T) / 2  # to the last bit: a mutual nearest pair has to have equal scores
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp(min=0)
    distances.fill_diagonal_(torch.inf)
    return distances.sort(1).values[:, : len(vectors) - num_byzantine - 2].sum(1)


def geometric_median_weights(
    vectors: CohortVectors, shares: Tensor, smoothing: float, tolerance: float, max_iterations: int
) -> tuple[Tensor, int]:
    """The mix that is the geometric median, by the smoothed Weiszfeld algorithm.

    Args:
        vectors: K displacements.
        shares: ``[K]`` float64, what each client counts; sums to one.
        smoothing: Distances below this count as this.
        tolerance: Ends when no weight changes by more.
        max_iterations: Ends at the latest after these; each passes over the vectors twice.

    Returns:
        ``[K]`` float64 summing to one, and the number of iterations.
    """
    weights, change, iterations = shares, torch.inf, 0
    while change > tolerance and iterations < max_iterations:
        distances = vectors.distances(vectors.weighted_sum(weights))
        old, weights = weights, normalized(shares / distances.clamp(min=smoothing))
        change, iterations = (weights - old).abs().max().item(), iterations + 1
    return weights, iterations


class _RobustRule(AggregationRule):
    """What the rules that name a number of wrong clients share."""

    def __init__(self, num_byzantine: int, **federation: Any) -> None:
        super().__init__(**federation)
        self.num_byzantine = arguments.integer("num_byzantine", num_byzantine, minimum=0)

    def _check_clients(self, cohort: Cohort, needed: int, keep: int = 0) -> None:
        if len(cohort) < needed:
            with_keep, or_keep = (f" with `keep`={keep}", " or `keep`") if keep else ("", "")
            raise ValueError(
                f"`num_byzantine`={self.num_byzantine}{with_keep} needs at least {needed} clients a round for"
                f" {type(self).__name__}, and round {cohort.round} has {len(cohort)}. Raise `clients_per_round` or"
                f" `num_clients`, or lower `num_byzantine`{or_keep}."
            )


class TrimmedMeanCallback(_RobustRule):
    """Per coordinate, average without the smallest and the largest values.

    Buffers are averaged over all clients alike; ``buffers="keep"`` or ``"recalibrate"`` where they cannot be trusted.

    Args:
        num_byzantine: How many clients of a cohort may be wrong: so many values are cut at either end.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If ``num_byzantine`` is not a whole number of at least 0; in a round with fewer than
            ``2 num_byzantine + 1`` clients.
    """

    key = "TrimmedMeanCallback"

    def __init__(self, num_byzantine: int = 1, **federation: Any) -> None:
        super().__init__(num_byzantine, **federation)

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """One trimmed mean."""
        self._check_clients(cohort, 2 * self.num_byzantine + 1)
        return _by_columns(cohort, state, self.num_byzantine)


class CoordinateMedianCallback(AggregationRule):
    """Per coordinate, the median; of an even number of clients the mean of the two middle values.

    Buffers are averaged over all clients alike; ``buffers="keep"`` or ``"recalibrate"`` where they cannot be trusted.

    Args:
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.
    """

    key = "MedianCallback"

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """One median."""
        return _by_columns(cohort, state, (len(cohort) - 1) // 2)


class MultiKrumCallback(_RobustRule):
    """Average the clients that have the nearest neighbors.

    Buffers are averaged over the chosen clients. Of clients with equal scores, the one with the lower number is taken.

    Args:
        num_byzantine: How many clients of a cohort may be wrong.
        keep: How many clients are averaged. Default: ``K - num_byzantine - 2``.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If an argument is not a whole number in its range; in a round with fewer than
            ``2 num_byzantine + 3`` clients or fewer than ``num_byzantine + keep``.
    """

    key = "MultiKrumCallback"

    def __init__(self, num_byzantine: int = 1, keep: int | None = None, **federation: Any) -> None:
        super().__init__(num_byzantine, **federation)
        self.keep = arguments.optional(arguments.integer, "keep", keep, minimum=1)

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """One choice, and the average of the chosen."""
        self._check_clients(cohort, 2 * self.num_byzantine + 3)
        if self.keep is not None:
            self._check_clients(cohort, self.num_byzantine + self.keep, self.keep)
        vectors = cohort.vectors
        scores = krum_scores(vectors.displacements, self.num_byzantine)
        order = sorted(range(len(cohort)), key=lambda slot: (scores[slot].item(), cohort.clients[slot].item()))
        chosen = order[: self.keep or len(cohort) - self.num_byzantine - 2]
        weights = torch.zeros(len(cohort), dtype=torch.float64)
        weights[chosen] = 1 / len(chosen)
        return RuleOutput(vectors.weighted_sum(weights), state, weights, {"clients_chosen": float(len(chosen))})


class KrumCallback(MultiKrumCallback):
    """Take the model of the client that has the nearest neighbors.

    Buffers are that client's too. Of clients with equal scores, the one with the lower number is taken.

    Args:
        num_byzantine: How many clients of a cohort may be wrong.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If ``num_byzantine`` is not a whole number of at least 0; in a round with fewer than
            ``2 num_byzantine + 3`` clients.
    """

    key = "KrumCallback"

    def __init__(self, num_byzantine: int = 1, **federation: Any) -> None:
        super().__init__(num_byzantine, keep=1, **federation)


class GeometricMedianCallback(AggregationRule):
    """The point with the least weighted sum of distances to the clients' models (RFA).

    It is a weighted average, and buffers are averaged with its weights.

    Args:
        smoothing: Distances below this count as this, so that a client's own model is no pole.
        tolerance: Iterations end when no client's weight changes by more.
        max_iterations: They end at the latest after these, converged or not (``iterations`` in the log says which);
            each passes over the cohort's vectors twice.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If a number is outside of its range.
    """

    key = "GeometricMedianCallback"

    def __init__(
        self, *, smoothing: float = 1e-6, tolerance: float = 1e-4, max_iterations: int = 20, **federation: Any
    ) -> None:
        super().__init__(**federation)
        self.smoothing = arguments.number("smoothing", smoothing, above=0)
        self.tolerance = arguments.number("tolerance", tolerance, above=0)
        self.max_iterations = arguments.integer("max_iterations", max_iterations, minimum=1)

    summary_metrics = ("iterations", "weight/max")

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """One geometric median."""
        vectors = cohort.vectors
        weights, iterations = geometric_median_weights(
            vectors.displacements, normalized(cohort.num_examples), self.smoothing, self.tolerance, self.max_iterations
        )
        metrics = {"iterations": float(iterations), "weight/max": weights.max().item()}
        return RuleOutput(vectors.weighted_sum(weights), state, weights, metrics)


def _by_columns(cohort: Cohort, state: State, cut: int) -> RuleOutput:
    vectors = cohort.vectors
    moved = vectors.displacements.map_columns(lambda values: trimmed_mean(values, cut))
    weights = torch.full((len(cohort),), 1 / len(cohort), dtype=torch.float64)
    return RuleOutput(cohort.start + moved.to(cohort.start), state, weights)

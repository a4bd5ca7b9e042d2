"""Robust rules: the models of a few clients, however wrong they are, change the global model by little.

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

The first four do not use numbers of examples: a client that sends a wrong model may send a wrong number too.
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
from lightning_fedhaw.vectors.kernels import dot


def trimmed_mean(values: Tensor, cut: int) -> Tensor:
    """Compute the mean of each column without its ``cut`` smallest and ``cut`` largest numbers.

    With ``cut = (K - 1) // 2`` it is the median.

    Args:
        values: ``[K, columns]``. The columns are sorted in place.
        cut: Numbers to leave out at either end.

    Returns:
        ``[columns]``.
    """
    num_rows = len(values)
    # Odd-even transposition: whole rows are compared, which takes a fifth of the time of `sort` or less.
    for turn in range(num_rows):
        upper = values[turn % 2 : num_rows - 1 : 2]  # [pairs, columns]
        lower = values[turn % 2 + 1 :: 2]  # [pairs, columns], the rows below those
        smaller = torch.minimum(upper, lower)
        torch.maximum(upper, lower, out=lower)
        upper.copy_(smaller)
    return values[cut : num_rows - cut].mean(0)


def squared_distances(vectors: CohortVectors) -> Tensor:
    """Compute the squared distances of all pairs of vectors.

    Returns:
        ``[K, K]`` float64, symmetric; infinite where float64 cannot hold the square.
    """
    products = vectors.gram()  # [K, K]
    # Exactly symmetric, because two vectors that are each other's nearest must have equal scores.
    products = (products + products.T) / 2
    squares = products.diagonal()  # [K]
    # Rounding may take the difference of nearly equal vectors below zero.
    distances = (squares[:, None] + squares - 2 * products).clamp(min=0)  # [K, K]
    # A square that overflows leaves NaN, and both mean that the two are far apart.
    return distances.nan_to_num(nan=torch.inf, posinf=torch.inf)


def krum_scores(vectors: CohortVectors, num_byzantine: int) -> Tensor:
    """Sum the squared distances of each vector to its ``K - num_byzantine - 2`` nearest others.

    Returns:
        ``[K]`` float64; infinite for a vector that is farther from its neighbors than float64 can square.
    """
    distances = squared_distances(vectors)  # [K, K]
    # A vector is not its own neighbor.
    distances.fill_diagonal_(torch.inf)
    num_neighbors = len(vectors) - num_byzantine - 2
    return distances.sort(1).values[:, :num_neighbors].sum(1)


def central_vector(vectors: CohortVectors, shares: Tensor) -> int:
    """Find the vector around which the smallest ball contains half of the weight.

    If wrong vectors have less than half of it, that ball contains a right one, and is not larger than the ball around
    any right one that contains all right ones. So this vector is near the right ones, however far the wrong ones are.

    Args:
        vectors: K vectors.
        shares: ``[K]`` float64, their weights; sums to one.
    """
    distances = squared_distances(vectors)  # [K, K]
    # Each ball contains its center.
    distances.fill_diagonal_(0.0)
    ordered, order = distances.sort(1)  # [K, K] each
    weight_within = shares[order].cumsum(1)  # [K, K]
    outermost = (weight_within < 0.5).sum(1).clamp(max=len(vectors) - 1)  # [K]
    radii = ordered.gather(1, outermost[:, None])[:, 0]  # [K], squared
    return int(radii.argmin())


def geometric_median_weights(
    vectors: CohortVectors, shares: Tensor, smoothing: float, tolerance: float, max_iterations: int
) -> tuple[Tensor, int]:
    """Find the mix that is the geometric median, by the Weiszfeld algorithm.

    It starts from the :func:`central_vector`, which no minority can move away, and not from the mean, from which a step
    covers only a part of the way back however far it is. Vectors at the center itself are treated as in Y. Vardi,
    C.-H. Zhang: The Multivariate L1-Median and Associated Data Depth. PNAS, 2000.

    Args:
        vectors: K displacements.
        shares: ``[K]`` float64, the weights of the distances; sums to one.
        smoothing: Vectors that are not farther than this from the center are at the center.
        tolerance: The iteration ends when no weight changes by more.
        max_iterations: The largest number of iterations, each of which passes over the vectors twice.

    Returns:
        ``[K]`` float64 summing to one, and the number of iterations.
    """
    weights = torch.zeros_like(shares)  # [K]
    weights[central_vector(vectors, shares)] = 1.0
    change = torch.inf
    iterations = 0
    while change > tolerance and iterations < max_iterations:
        center = vectors.weighted_sum(weights)  # [P]
        new_weights = _weiszfeld_weights(vectors, center, shares, smoothing)  # [K]
        change = (new_weights - weights).abs().max().item()
        weights = new_weights
        iterations += 1
    return weights, iterations


def _weiszfeld_weights(vectors: CohortVectors, center: Tensor, shares: Tensor, smoothing: float) -> Tensor:
    """Return the weights ``[K]`` of the mix that is nearer to the geometric median than the center is.

    Args:
        vectors: K displacements.
        center: ``[P]``.
        shares: ``[K]`` float64, the weights of the distances; sums to one.
        smoothing: Vectors that are not farther than this from the center are at the center.
    """
    distances = vectors.distances(center)  # [K]
    is_near = distances <= smoothing  # [K]
    pulls = torch.where(is_near, 0.0, shares / distances.clamp(min=smoothing))  # [K]
    total_pull = pulls.sum()  # []
    if not is_near.any():
        return pulls / total_pull
    near_share = shares[is_near].sum()  # []
    near_weights = torch.where(is_near, shares, 0.0) / near_share  # [K]
    if not total_pull > 0:
        return near_weights
    far_weights = pulls / total_pull  # [K]
    step = vectors.weighted_sum(far_weights) - center  # [P]
    force = total_pull * dot(step, step).sqrt()  # []
    # The others pull the center away from the vectors at it with this force, and these hold it with their share.
    hold = (near_share / force).clamp(max=1.0)  # []
    return (1 - hold) * far_weights + hold * near_weights


class _RobustRule(AggregationRule):
    """A rule with a number of clients that may be wrong."""

    takes_substitutes = False

    def __init__(self, num_byzantine: int, **federation: Any) -> None:
        super().__init__(**federation)
        self.num_byzantine = arguments.integer("num_byzantine", num_byzantine, minimum=0)

    def _check_clients(self, cohort: Cohort, needed: int, keep: int = 0) -> None:
        """Refuse a cohort of fewer clients than needed; ``keep`` is named in the message if it is the reason."""
        if len(cohort) >= needed:
            return
        keep_setting = f" with `keep`={keep}" if keep else ""
        keep_remedy = " or `keep`" if keep else ""
        raise ValueError(
            f"`num_byzantine`={self.num_byzantine}{keep_setting} needs at least {needed} clients a round for"
            f" {type(self).__name__}, and round {cohort.round} has {len(cohort)}. Raise `clients_per_round` or"
            f" `num_clients`, or lower `num_byzantine`{keep_remedy}."
        )


class TrimmedMeanCallback(_RobustRule):
    """Per coordinate, average without the smallest and the largest values.

    Buffers are averaged over all clients equally; use ``buffers="keep"`` or ``"recalibrate"`` where clients' buffers
    cannot be trusted.

    Args:
        num_byzantine: Number of clients of a cohort that may be wrong, and of values that are cut at either end.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If ``num_byzantine`` is not a whole number of at least 0; in a round with fewer than
            ``2 num_byzantine + 1`` clients.
    """

    key = "TrimmedMeanCallback"

    def __init__(self, num_byzantine: int = 1, **federation: Any) -> None:
        super().__init__(num_byzantine, **federation)
        self.min_updates = 2 * self.num_byzantine + 1

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Compute the trimmed mean."""
        self._check_clients(cohort, self.min_updates)
        return _trimmed(cohort, state, self.num_byzantine)


class CoordinateMedianCallback(AggregationRule):
    """Per coordinate, the median; of an even number of clients the mean of the two middle values.

    Buffers are averaged over all clients equally; use ``buffers="keep"`` or ``"recalibrate"`` where clients' buffers
    cannot be trusted.

    Args:
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.
    """

    key = "MedianCallback"

    takes_substitutes = False

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Compute the median."""
        return _trimmed(cohort, state, (len(cohort) - 1) // 2)


class MultiKrumCallback(_RobustRule):
    """Average the clients that have the nearest neighbors.

    Buffers are averaged over the chosen clients. Of clients with equal scores, the one with the lower number is taken.

    Args:
        num_byzantine: Number of clients of a cohort that may be wrong.
        keep: Number of clients that are averaged. Default: ``K - num_byzantine - 2``.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If an argument is not a whole number in its range; in a round with fewer than
            ``2 num_byzantine + 3`` clients or fewer than ``num_byzantine + keep``.
    """

    key = "MultiKrumCallback"

    def __init__(self, num_byzantine: int = 1, keep: int | None = None, **federation: Any) -> None:
        super().__init__(num_byzantine, **federation)
        self.keep = arguments.optional(arguments.integer, "keep", keep, minimum=1)
        self.min_updates = max(2 * self.num_byzantine + 3, self.num_byzantine + (self.keep or 0))

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Choose clients, and average their models."""
        self._check_clients(cohort, 2 * self.num_byzantine + 3)
        if self.keep is not None:
            self._check_clients(cohort, self.num_byzantine + self.keep, self.keep)
        vectors = cohort.vectors
        scores = krum_scores(vectors.displacements, self.num_byzantine)  # [K]
        # The client's number decides between equal scores, so that the order of the cohort does not matter.
        order = sorted(range(len(cohort)), key=lambda slot: (scores[slot].item(), cohort.clients[slot].item()))
        num_chosen = self.keep or len(cohort) - self.num_byzantine - 2
        chosen = order[:num_chosen]
        weights = torch.zeros(len(cohort), dtype=torch.float64)  # [K]
        weights[chosen] = 1 / len(chosen)
        return RuleOutput(vectors.weighted_sum(weights), state, weights, {"clients_chosen": float(len(chosen))})


class KrumCallback(MultiKrumCallback):
    """Take the model of the client that has the nearest neighbors.

    Buffers are that client's too. Of clients with equal scores, the one with the lower number is taken.

    Args:
        num_byzantine: Number of clients of a cohort that may be wrong.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If ``num_byzantine`` is not a whole number of at least 0; in a round with fewer than
            ``2 num_byzantine + 3`` clients.
    """

    key = "KrumCallback"

    def __init__(self, num_byzantine: int = 1, **federation: Any) -> None:
        super().__init__(num_byzantine, keep=1, **federation)


class GeometricMedianCallback(AggregationRule):
    """Take the point with the least weighted sum of distances to the clients' models (RFA).

    It is a weighted average, and buffers are averaged with its weights.

    Args:
        smoothing: Models that are not farther than this from the present point count as equal to it, so that no weight
            becomes infinite.
        tolerance: The iteration ends when no client's weight changes by more.
        max_iterations: The largest number of iterations, each of which passes over the cohort's vectors twice. The log
            has the number as ``iterations``; if it is this one, the weights may not have converged.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If a number is outside of its range.
    """

    key = "GeometricMedianCallback"

    takes_substitutes = False

    summary_metrics = ("iterations", "weight/max")

    def __init__(
        self, *, smoothing: float = 1e-6, tolerance: float = 1e-4, max_iterations: int = 20, **federation: Any
    ) -> None:
        super().__init__(**federation)
        self.smoothing = arguments.number("smoothing", smoothing, above=0)
        self.tolerance = arguments.number("tolerance", tolerance, above=0)
        self.max_iterations = arguments.integer("max_iterations", max_iterations, minimum=1)

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Compute the geometric median."""
        vectors = cohort.vectors
        weights, iterations = geometric_median_weights(
            vectors.displacements, normalized(cohort.num_examples), self.smoothing, self.tolerance, self.max_iterations
        )
        metrics = {"iterations": float(iterations), "weight/max": weights.max().item()}
        return RuleOutput(vectors.weighted_sum(weights), state, weights, metrics)


def _trimmed(cohort: Cohort, state: State, cut: int) -> RuleOutput:
    """Return the trimmed mean of a cohort; the weights are uniform, because no client has one of its own in it."""
    # Displacements may be stored in host memory or another dtype than the model, and the result is then too.
    displacements = cohort.vectors.displacements
    server_step = displacements.map_columns(lambda values: trimmed_mean(values, cut))  # [P]
    weights = torch.full((len(cohort),), 1 / len(cohort), dtype=torch.float64)  # [K]
    return RuleOutput(cohort.start + server_step.to(cohort.start), state, weights)

"""FedAdp: weigh clients by the angle between their update and the average update.

H. Wu, P. Wang: Fast-Convergent Federated Learning with Adaptive Weighting. IEEE Transactions on Cognitive
Communications and Networking, 2021; formulas as in the code of FedHAW's authors (github.com/a-nakai-k/FedHAW).

Shapes: N clients exist, K are in the cohort, P parameters. With ``q_k`` [P] the displacement of client k, in radians::

    theta_k  <- arccos <q_k, q> / (|q_k| |q|)          q = sum_k p_k q_k, p_k = n_k / sum_j n_j
    smooth_k <- ((r - 1) smooth_k + theta_k) / r       r: the rounds that client k has taken part in, this one included
    f(x)     =  alpha (1 - exp(-exp(-alpha (x - 1))))          alpha: the argument ``gompertz``
    w        <- sum_k psi_k w_k                        psi_k = n_k exp(f(smooth_k)) / sum_j n_j exp(f(smooth_j))
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, normalized
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import RuleOutput, ServerView, State
from lightning_fedhaw.vectors.base import CohortVectors
from lightning_fedhaw.vectors.kernels import dot

Smoothing = Literal["participations", "rounds"]


def angles(updates: CohortVectors, shares: Tensor) -> Tensor:
    """Compute the angle between each update and the average update.

    Args:
        updates: K displacements.
        shares: ``[K]``, the weights of the average.

    Returns:
        ``[K]`` float64 in [0, pi]; a right angle where the update or the average is zero.
    """
    average = updates.weighted_sum(shares)  # [P]
    products_of_norms = updates.norms() * dot(average, average).sqrt()  # [K]
    cosines = torch.where(products_of_norms > 0, updates.inner(average) / products_of_norms, 0.0)  # [K]
    # Rounding may take a cosine beyond 1, where `arccos` is NaN.
    return cosines.clamp(-1, 1).arccos()


def gompertz(angle: Tensor, alpha: float) -> Tensor:
    """Return ``alpha (1 - exp(-exp(-alpha (angle - 1))))``: near alpha for aligned updates, near 0 for opposed ones.

    Args:
        angle: ``[K]``, in radians.
        alpha: The steepness.
    """
    return alpha * (1 - (-(-alpha * (angle - 1)).exp()).exp())


class FedAdpCallback(AggregationRule):
    """Weigh clients by how well their update agrees with the average update.

    Args:
        gompertz: The factor ``alpha`` of the Gompertz function, how sharply weights fall with the angle: an aligned
            client weighs up to ``exp(gompertz)`` times as much as an opposed one. 0 is FedAvg.
        smooth_by: ``"participations"``: a client's angles are averaged over the rounds in which its update was
            received, as published.
            ``"rounds"``: over all rounds, whether the client took part or not, as in FedHAW's authors' code.
        smooth_substitutes: Whether a substitute for an update that was not received counts as what its client sent,
            in its smoothed angle as in the average, as in that code: a zero update has a right angle. Otherwise only
            received updates count.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``angles`` [N] float64, smoothed and in radians, and ``counts`` [N] int64, the rounds behind them.

    Raises:
        ValueError: If an argument is not one of the allowed values.
    """

    key = "FedAdpCallback"

    summary_metrics = ("weight/min", "weight/max")

    def __init__(
        self,
        gompertz: float = 5.0,
        *,
        smooth_by: Smoothing = "participations",
        smooth_substitutes: bool = False,
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.gompertz = arguments.number("gompertz", gompertz, minimum=0)
        self.smooth_by = arguments.choice("smooth_by", smooth_by, Smoothing)
        self.smooth_substitutes = arguments.flag("smooth_substitutes", smooth_substitutes)
        self.takes_substitutes = self.smooth_substitutes

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Return angles and counts of zero."""
        return {
            "angles": torch.zeros(len(num_examples), dtype=torch.float64),
            "counts": torch.zeros(len(num_examples), dtype=torch.int64),
        }

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Smooth the clients' angles, and average the models with the weights that follow."""
        vectors = cohort.vectors
        clients = cohort.clients  # [K]
        round_angles = angles(vectors.displacements, normalized(cohort.num_examples))  # [K]
        is_smoothed = cohort.received | self.smooth_substitutes  # [K]
        smooth_angles = self._smoothed(round_angles, is_smoothed, cohort, state)  # [K]
        heights = gompertz(smooth_angles, self.gompertz)  # [K]
        # The largest height is subtracted so that `exp` cannot overflow; it cancels in the normalization.
        weights = normalized(cohort.num_examples * (heights - heights.max()).exp())  # [K]
        new_angles = state["angles"].clone()  # [N]
        new_angles[clients[is_smoothed]] = smooth_angles[is_smoothed]
        new_counts = state["counts"].clone()  # [N]
        new_counts[clients[is_smoothed]] += 1
        return RuleOutput(
            parameters=vectors.weighted_sum(weights),
            state={"angles": new_angles, "counts": new_counts},
            weights=weights,
            metrics={
                "angle/mean": round_angles.mean().item(),
                "angle/max": round_angles.max().item(),
                "weight/min": weights.min().item(),
                "weight/max": weights.max().item(),
                "weight/effective_clients": (1 / weights.square().sum()).item(),
            },
        )

    def _smoothed(self, round_angles: Tensor, is_smoothed: Tensor, cohort: Cohort, state: State) -> Tensor:
        """Average the clients' angles over rounds.

        Args:
            round_angles: ``[K]``, the angles of this round.
            is_smoothed: ``[K]`` bool, whether this round's angle enters the client's average.
            cohort: The updates that the server received.
            state: The rule's state. Not changed.

        Returns:
            ``[K]``.
        """
        counts = state["counts"][cohort.clients]  # [K]
        averages = state["angles"][cohort.clients]  # [K]
        rounds = counts + 1  # [K]
        if self.smooth_by == "rounds":
            rounds = torch.full_like(counts, cohort.round + 1)  # [K]
        with_this_round = ((rounds - 1) * averages + round_angles) / rounds  # [K]
        # A client whose update was never received has no average: it is weighted by its substitute's angle.
        without_this_round = torch.where(counts > 0, averages, round_angles)  # [K]
        return torch.where(is_smoothed, with_this_round, without_this_round)

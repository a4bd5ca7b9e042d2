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
    """Angle between each update and their average, ``[K]`` float64 in [0, pi]; a right angle where either is zero.

    Args:
        updates: K displacements.
        shares: ``[K]``, the weights of the average.
    """
    average = updates.weighted_sum(shares)
    lengths = updates.norms() * dot(average, average).sqrt()
    cosines = torch.where(lengths > 0, updates.inner(average) / lengths, 0.0)
    return cosines.clamp(-1, 1).arccos()


def gompertz(angle: Tensor, alpha: float) -> Tensor:
    """``alpha (1 - exp(-exp(-alpha (angle - 1))))``: near alpha for aligned updates, near 0 for opposed ones."""
    return alpha * (1 - (-(-alpha * (angle - 1)).exp()).exp())


class FedAdpCallback(AggregationRule):
    """Weigh clients by how well their update agrees with the average update.

    Args:
        gompertz: The factor ``alpha`` of the Gompertz function, how sharply weights fall with the angle: an aligned
            client weighs up to ``exp(gompertz)`` times as much as an opposed one. 0 is FedAvg.
        smooth_by: ``"participations"``: a client's angles are averaged over the rounds in which its update was
            received, as published.
            ``"rounds"``: over the number of the round, whoever took part, as in FedHAW's authors' code.
        smooth_substitutes: Whether the substitute for an update that was not received counts as an angle of its own,
            as in that code: a zero update is a right angle.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``angles`` [N] float64, smoothed and in radians, and ``counts`` [N] int64, the rounds behind them.

    Raises:
        ValueError: If an argument is not one of the allowed values.
    """

    key = "FedAdpCallback"

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

    summary_metrics = ("weight/min", "weight/max")

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """No angles yet."""
        return {
            "angles": torch.zeros(len(num_examples), dtype=torch.float64),
            "counts": torch.zeros(len(num_examples), dtype=torch.int64),
        }

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """One mean of angles a client, and the average it leads to."""
        vectors, clients = cohort.vectors, cohort.clients
        seen = angles(vectors.displacements, normalized(cohort.num_examples))
        counts, smooth = state["counts"][clients], state["angles"][clients]
        counted = cohort.received | self.smooth_substitutes
        rounds = counts + 1 if self.smooth_by == "participations" else torch.full_like(counts, cohort.round + 1)
        # A client whose update was never received is weighted by its substitute's angle.
        smooth = torch.where(counted, ((rounds - 1) * smooth + seen) / rounds, torch.where(counts > 0, smooth, seen))
        heights = gompertz(smooth, self.gompertz)
        weights = normalized(cohort.num_examples * (heights - heights.max()).exp())
        new_angles, new_counts = state["angles"].clone(), state["counts"].clone()
        new_angles[clients[counted]] = smooth[counted]
        new_counts[clients[counted]] += 1
        return RuleOutput(
            parameters=vectors.weighted_sum(weights),
            state={"angles": new_angles, "counts": new_counts},
            weights=weights,
            metrics={
                "angle/mean": seen.mean().item(),
                "angle/max": seen.max().item(),
                "weight/min": weights.min().item(),
                "weight/max": weights.max().item(),
                "weight/effective_clients": (1 / weights.square().sum()).item(),
            },
        )

"""FedLWS: shrink the average layer by layer, the more the clients' updates disagree.

C. Shi, J. Li, H. Zhao, D. Guo, Y. Chang: FedLWS: Federated Learning with Adaptive Layer-wise Weight Shrinking. ICLR
2025; formulas as in the authors' code.

Per layer l, with ``w`` the broadcast model and ``d_k = w_k - w`` of the cohort's K clients::

    average =  sum_k p_k w_k                                       p_k = n_k / sum_j n_j
    v       =  (1 / K) sum_k |d_k - (1 / K) sum_j d_j|
    tau     =  beta v, but at least tau_min and at most tau_max
    shrink  =  |w| / (|w| + tau |average - w|)
    w       <- shrink average
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, normalized
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import RuleOutput, ServerView, State
from lightning_fedhaw.vectors.base import CohortVectors
from lightning_fedhaw.vectors.client_vectors import ClientVectors

ZERO_NORM = 1e-12
"""A layer whose norm is below this is not shrunk: a layer that starts at zero would stay there."""


def shrinking(
    updates: CohortVectors,
    start: Tensor,
    displacement: Tensor,
    groups: Mapping[str, Sequence[slice]],
    beta: float,
    tau_min: float,
    tau_max: float,
) -> Tensor:
    """Compute the factor on each layer.

    Args:
        updates: K displacements.
        start: ``[P]``, the broadcast model.
        displacement: ``[P]``, the average model minus the broadcast one.
        groups: Slices of the flat vector, by layer.
        beta: Factor on the disagreement.
        tau_min: The least ``tau``.
        tau_max: The greatest ``tau``.

    Returns:
        ``[layers]`` float64, in (0, 1].
    """
    uniform = torch.full((len(updates),), 1 / len(updates), dtype=torch.float64)  # [K]
    mean = updates.weighted_sum(uniform)  # [P]
    disagreement = updates.distances(mean, groups).mean(1)  # [layers, K] -> [layers]
    tau = (beta * disagreement).clamp(tau_min, tau_max)  # [layers]
    # Both vectors as two rows of one matrix, because the norm of each layer is a verb of such matrices.
    rows = ClientVectors(torch.stack([start, displacement.to(start)]))  # [2, P]
    start_norms, displacement_norms = rows.norms(groups).unbind(1)  # [layers] each
    return torch.where(start_norms < ZERO_NORM, 1.0, start_norms / (start_norms + tau * displacement_norms))


class FedLWSCallback(AggregationRule):
    """Average, then shrink each layer by how much the clients disagree on it; without any server data.

    A layer is a module's own parameters, weight and bias together. Buffers are averaged and never shrunk.

    Args:
        beta: How strongly a layer shrinks where clients disagree. 0, with ``tau_min=0``, is FedAvg.
        tau_min: The least ``tau``, the ratio of shrinking to moving. ``0`` and ``tau_max=inf`` give the variant without
            bounds.
        tau_max: The greatest ``tau``.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If a number is outside of its range.
    """

    key = "FedLWSCallback"

    takes_substitutes = False

    summary_metrics = ("shrink/min", "shrink/mean")

    def __init__(self, beta: float = 0.03, *, tau_min: float = 0.01, tau_max: float = 0.2, **federation: Any) -> None:
        super().__init__(**federation)
        self.beta = arguments.number("beta", beta, minimum=0)
        self.tau_min = arguments.number("tau_min", tau_min, minimum=0)
        self.tau_max = arguments.number(
            "tau_max", tau_max, minimum=self.tau_min, infinite=True, hint="It may not be less than `tau_min`."
        )

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Average the local models, and shrink the average layer by layer."""
        weights = normalized(cohort.example_weights)  # [K]
        groups = server.layout.groups()
        updates = cohort.vectors.displacements
        # Displacements may be stored in host memory or another dtype than the model, and their sum is then too.
        displacement = updates.weighted_sum(weights).to(cohort.start)  # [P]
        factors = shrinking(
            updates, cohort.start, displacement, groups, self.beta, self.tau_min, self.tau_max
        )  # [layers]
        parameters = cohort.start + displacement  # [P]
        for factor, slices in zip(factors.tolist(), groups.values(), strict=True):
            for columns in slices:
                parameters[columns] *= factor
        metrics = {"shrink/min": factors.min().item(), "shrink/mean": factors.mean().item()}
        return RuleOutput(parameters, state, weights, metrics)

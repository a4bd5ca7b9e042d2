"""FedAvg: average the local models by their number of training examples.

H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas: Communication-Efficient Learning of Deep Networks
from Decentralized Data. AISTATS 2017, Algorithm 1.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, normalized
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.rule import RuleOutput, ServerView, State

Weighting = Literal["examples", "batches", "uniform"]


class FedAvgCallback(AggregationRule):
    """Average the local models: ``w <- sum_k p_k w_k`` with ``p_k = n_k / sum_j n_j`` over the received updates.

    Args:
        weighting: ``"examples"``: by the number of training examples, as published. ``"batches"``: by
            the number of batches in a pass over them, as FedHAW's authors do for FedProx. ``"uniform"``: equal weights.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If ``weighting`` is unknown.
    """

    key = "FedAvgCallback"

    def __init__(self, weighting: Weighting = "examples", **federation: Any) -> None:
        super().__init__(**federation)
        self.weighting: Weighting = arguments.choice("weighting", weighting, Weighting)

    def unnormalized_weight(self, update: ClientUpdate) -> float:
        """Return a client's weight before normalization."""
        if self.weighting == "examples":
            return float(update.example_weight)
        if self.weighting == "batches":
            return float(update.num_batches)
        return 1.0

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Average the local models."""
        if self.weighting == "examples":
            weights = normalized(cohort.example_weights)  # [K]
        elif self.weighting == "batches":
            weights = normalized(cohort.num_batches)  # [K]
        else:
            weights = normalized(torch.ones(len(cohort)))  # [K]
        return RuleOutput(parameters=cohort.vectors.weighted_sum(weights), state=state, weights=weights)

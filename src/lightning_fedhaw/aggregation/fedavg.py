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
    """Average the local models: ``w <- sum_k p_k w_k`` with ``p_k = n_k / sum_j n_j`` over the clients that arrived.

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
        self.weighting = arguments.choice("weighting", weighting, Weighting)

    def unnormalized_weight(self, update: ClientUpdate) -> float:
        """A client's weight before normalization."""
        return {"examples": float(update.num_examples), "batches": float(update.num_batches)}.get(self.weighting, 1.0)

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """One average."""
        counts = {"examples": cohort.num_examples, "batches": cohort.num_batches}.get(
            self.weighting, torch.ones(len(cohort))
        )
        weights = normalized(counts)
        return RuleOutput(parameters=cohort.vectors.weighted_sum(weights), state=state, weights=weights)

"""q-FedAvg: give clients with larger losses more weight, so that accuracy is distributed more evenly over clients.

T. Li, M. Sanjabi, A. Beirami, V. Smith: Fair Resource Allocation in Federated Learning. ICLR 2020, Algorithm 2.

With ``F_k``, the client's mean loss at the model that was broadcast, and ``L``, the inverse of the local learning
rate::

    u_k = -L d_k        h_k = q F_k^(q-1) |u_k|^2 + L F_k^q        w <- w - sum_k F_k^q u_k / sum_k h_k

The objective is ``sum_k F_k^(q+1) / (q+1)``, and ``1 / sum_k h_k`` estimates the step that its curvature allows.

Shapes: K clients are in the cohort, P trainable parameters.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, common_rate, normalized
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import RuleOutput, ServerView, State

SMALLEST_LOSS = 1e-10
"""The smallest loss that is computed with: ``F_k^(q-1)`` is infinite at 0. The authors' code adds this number."""


class QFedAvgCallback(AggregationRule):
    """Step along the displacements weighted by powers of the clients' losses; ``q=0`` is the mean of the models.

    Clients need non-negative losses. A substitute for an update that was not received has no loss and no weight.

    Args:
        q: The fairness parameter, at least 0: the larger, the more a client with a large loss counts.
        lipschitz: ``L``, an estimate of the curvature. ``"auto"``: the inverse of the clients' learning rate in the
            round, as published.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If an argument is not one of the allowed values; in a round, if a client's loss is negative, or if
            ``L`` is to be read from learning rates that differ between parameters.
    """

    key = "QFedAvgCallback"

    needs_initial_loss = True

    summary_metrics = ("server_step",)

    def __init__(self, q: float = 1.0, *, lipschitz: float | Literal["auto"] = "auto", **federation: Any) -> None:
        super().__init__(**federation)
        self.q = arguments.number("q", q, minimum=0)
        self.lipschitz: float | Literal["auto"] = "auto"
        self.needs_learning_rates = isinstance(lipschitz, str) and lipschitz == "auto"
        if not self.needs_learning_rates:
            hint = 'Or "auto", by which it is the inverse of the clients\' learning rate.'
            self.lipschitz = arguments.number("lipschitz", lipschitz, above=0, hint=hint)

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Take the step of the losses' powers."""
        lipschitz = self._lipschitz(cohort)
        losses = self._losses(cohort)  # [K]
        powers = torch.where(cohort.received, losses**self.q, 0.0)  # [K]
        if not powers.any():
            # Only substitutes: nothing is known about the clients' losses.
            weights = normalized(cohort.example_weights)  # [K]
            return RuleOutput(cohort.start.clone(), state, weights, {"server_step": 0.0})
        displacements = cohort.vectors.displacements
        norms = lipschitz * displacements.norms().to(powers)  # [K], of `u_k`
        curvatures = self.q * losses ** (self.q - 1) * norms.square() + lipschitz * powers  # [K]
        total = torch.where(cohort.received, curvatures, 0.0).sum()  # []
        step = displacements.weighted_sum(lipschitz * powers / total)  # [P]
        metrics = {"server_step": (lipschitz * powers.sum() / total).item()}
        # Displacements may be stored in host memory or another dtype than the model, and their sum is then too.
        return RuleOutput(cohort.start + step.to(cohort.start), state, powers / powers.sum(), metrics)

    def _lipschitz(self, cohort: Cohort) -> float:
        if self.lipschitz != "auto":
            return self.lipschitz
        rate = common_rate(cohort.learning_rates, "q-FedAvg", "give `lipschitz=`, the inverse of a typical one")
        if not rate > 0:
            raise ValueError(f"q-FedAvg divides by the clients' learning rate, which is {rate}. Give `lipschitz=`.")
        return 1 / rate

    def _losses(self, cohort: Cohort) -> Tensor:
        """Return the clients' losses ``[K]``, not smaller than ``SMALLEST_LOSS``; 1 for a substitute, which has none.

        Raises:
            ValueError: If a loss is negative or not finite.
        """
        losses = torch.where(cohort.received, cohort.initial_losses, 1.0)  # [K]
        for client, loss in zip(cohort.clients.tolist(), losses.tolist(), strict=True):
            if not 0 <= loss < float("inf"):
                raise ValueError(
                    f"q-FedAvg takes powers of the clients' losses, which must be finite and not negative, got {loss}"
                    f" for client {client}. Use a loss that is at least 0, or another rule."
                )
        return losses.clamp(min=SMALLEST_LOSS)

"""SCAFFOLD: clients correct their gradients towards the average gradient of all clients.

S. P. Karimireddy, S. Kale, M. Mohri, S. J. Reddi, S. U. Stich, A. T. Suresh: SCAFFOLD: Stochastic Controlled Averaging
for Federated Learning. ICML 2020, Algorithm 1. The clients' part is ``objectives/scaffold.py``.
"""

from __future__ import annotations

from typing import Any

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.objectives.scaffold import ControlOption, ScaffoldObjective
from lightning_fedhaw.rule import RuleOutput, ServerView, State


class ScaffoldCallback(AggregationRule):
    """Let clients correct their gradients by control variates, and step along the plain mean of their updates.

    It is :class:`~lightning_fedhaw.objectives.ScaffoldObjective` with ``w <- w + server_lr (1 / K) sum_k (w_k - w)``.

    Args:
        option: How control variates are computed: ``"II"``, from a client's displacement, or ``"I"``, from one more
            pass over its data.
        server_lr: The server's learning rate.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If an argument is not one of the allowed values; when ``fit`` begins, if the objective refuses the
            clients' optimizers.
    """

    key = "ScaffoldCallback"

    def __init__(self, option: ControlOption = "II", server_lr: float = 1.0, **federation: Any) -> None:
        super().__init__(**federation)
        self.option: ControlOption = arguments.choice("option", option, ControlOption)
        self.server_lr = arguments.number("server_lr", server_lr, minimum=0)
        self.objectives = (ScaffoldObjective(self.option),)

    def unnormalized_weight(self, update: ClientUpdate) -> float:
        """Return 1: all clients have the same weight."""
        return 1.0

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Step along the mean of the displacements."""
        weights = self.cohort_weights(cohort)  # [K]
        # Displacements may be stored in host memory or another dtype than the model, and their sum is then too.
        server_step = cohort.vectors.displacements.weighted_sum(self.server_lr * weights)  # [P]
        return RuleOutput(cohort.start + server_step.to(cohort.start), state, weights)

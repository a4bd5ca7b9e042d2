"""FedDyn: dynamic regularization, by which the clients' optima approach the server's.

D. A. E. Acar, Y. Zhao, R. Matas, M. Mattina, P. Whatmough, V. Saligrama: Federated Learning Based on Dynamic
Regularization. ICLR 2021, Algorithm 1. The clients' part is ``objectives/feddyn.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, normalized
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.objectives.feddyn import DynPenalty, FedDynObjective
from lightning_fedhaw.rule import RuleOutput, ServerView, State


class FedDynCallback(AggregationRule):
    """Regularize the clients' losses dynamically, and correct the mean of their models by the mean of the gradients.

    It is :class:`~lightning_fedhaw.objectives.FedDynObjective` with, over the K received updates of N clients::

        h <- h - alpha (1 / N) sum_k (w_k - w)          w <- (1 / K) sum_k w_k - h / alpha

    The substitute for an update that was not received is in the mean and not in ``h``, which stays the mean of all
    clients' ``g_k``.

    Args:
        regularization: The factor ``alpha``, above 0. With small values the model follows the clients quickly; large
            ones keep the clients near the global model.
        penalty: As of :class:`~lightning_fedhaw.objectives.FedDynObjective`.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``h`` [P], and N as ``num_clients``.

    Raises:
        ValueError: If an argument is not one of the allowed values.
    """

    key = "FedDynCallback"

    def __init__(self, regularization: float = 0.01, penalty: DynPenalty = "square", **federation: Any) -> None:
        super().__init__(**federation)
        self.regularization = arguments.number(
            "regularization", regularization, above=0, hint="The server divides by it."
        )
        self.penalty: DynPenalty = arguments.choice("penalty", penalty, DynPenalty)
        self.objectives = (FedDynObjective(self.regularization, self.penalty),)

    @property
    def resume_key(self) -> str:
        """The factor ``alpha``, which ``h`` and the clients' duals are multiples of."""
        return f"{type(self).key}(regularization={self.regularization})"

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Return ``h = 0``."""
        return {"h": torch.zeros_like(start), "num_clients": len(num_examples)}

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Average the models, and correct the average by ``h``."""
        weights = normalized(torch.ones(len(cohort)))  # [K]
        # Over N and not over K, and without the substitutes: `h` is the mean over all clients' gradients `g_k`.
        received_shares = cohort.received.double() / state["num_clients"]  # [K]
        displacement = cohort.vectors.displacements.weighted_sum(received_shares)  # [P]
        h = state["h"].to(cohort.start) - self.regularization * displacement.to(cohort.start)  # [P]
        parameters = cohort.vectors.weighted_sum(weights) - h / self.regularization  # [P]
        return RuleOutput(parameters, {**state, "h": h}, weights)

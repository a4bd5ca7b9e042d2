"""FedExP: the server's step from how much the clients' updates disagree.

D. Jhunjhunwala, S. Wang, G. Joshi: FedExP: Speeding Up Federated Averaging via Extrapolation. ICLR 2023.

With ``d_k`` [P] the displacement of client k and shares ``p_k``::

    d   =  sum_k p_k d_k
    eta =  max(1, sum_k p_k |d_k|^2 / (2 (|d|^2 + eps)))
    w   <- w + eta d

With equal shares this is the paper's formula. Its code weighs by examples, multiplies ``eps`` by the number of clients,
and lets it decay with the square of the local learning rate. The paper evaluates the average of the last two models,
because the step makes them oscillate; here the model that is trained is also the one that is evaluated.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, Weighting, client_weights
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import RuleOutput, ServerView, State
from lightning_fedhaw.vectors.kernels import dot


def extrapolation(norms: Tensor, weights: Tensor, length: float, eps: float) -> float:
    """Return the server's step: half the mean square of the updates over the square of their mean, at least 1.

    Args:
        norms: ``[K]``, the lengths of the updates.
        weights: ``[K]``, the shares of the mean.
        length: The length of the mean update.
        eps: Added to the square of that length.
    """
    mean_square = float((weights * norms.square()).sum())
    denominator = 2 * (length**2 + eps)
    # Nothing moved, or the clients cancel each other: there is no direction in which to go farther.
    if denominator == 0:
        return 1.0
    return max(1.0, mean_square / denominator)


class FedExPCallback(AggregationRule):
    """Go farther than the average update if the clients' updates differ from each other.

    Args:
        eps: Limits the step if the mean update is small. It is in units of the squared mean update, so it depends on
            the model and the local learning rate.
        weighting: Shares by the number of training ``"examples"``, or ``"uniform"``.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If an argument is not one of the allowed values.
    """

    key = "FedExPCallback"

    summary_metrics = ("server_step",)

    def __init__(self, eps: float = 1e-3, *, weighting: Weighting = "examples", **federation: Any) -> None:
        super().__init__(**federation)
        self.eps = arguments.number("eps", eps, minimum=0)
        self.weighting: Weighting = arguments.choice("weighting", weighting, Weighting)

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Average the updates, and follow the average for the step that their disagreement gives."""
        weights = client_weights(cohort, self.weighting)  # [K]
        updates = cohort.vectors.displacements
        # Displacements may be stored in host memory or another dtype than the model, and their sum is then too.
        mean = updates.weighted_sum(weights).to(cohort.start)  # [P]
        length = dot(mean, mean).sqrt().item()
        server_step = extrapolation(updates.norms(), weights, length, self.eps)
        return RuleOutput(cohort.start + server_step * mean, state, weights, {"server_step": server_step})

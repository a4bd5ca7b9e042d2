"""FedAWA: learn the clients' weights from the clients' updates, without data on the server.

C. Shi, H. Zhao, B. Zhang, M. Zhou, D. Guo, Y. Chang: FedAWA: Adaptive Optimization of Aggregation Weights in Federated
Learning Using Client Vectors. CVPR 2025.

With ``w_k`` [P] the received models, ``d_k = w_k - w``, logits ``x_k`` that are kept between rounds, and
``s = softmax(x)`` over the clients of the cohort::

    L(x) = sum_k s_k (1 - cos(w, w_k)) + sum_k s_k |d_k - sum_j s_j d_j|
    x   <- one or a few steps of an optimizer on L
    w   <- sum_k s_k w_k

The derivative with respect to the shares is written out below, so that a step reads the cohort's vectors and needs no
graph through them. The paper starts from the shares of the examples.

Shapes: N clients exist, K are in the cohort, P trainable parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import normalized
from lightning_fedhaw.aggregation.factories import OptimizerFactory, check_optimizer
from lightning_fedhaw.aggregation.guard import GuardedRule
from lightning_fedhaw.aggregation.hypergradient import learned_logits
from lightning_fedhaw.aggregation.proxy import ADAM
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import RuleOutput, ServerView, State
from lightning_fedhaw.vectors.base import CohortVectors
from lightning_fedhaw.vectors.kernels import dot


def model_distances(vectors: CohortVectors, start: Tensor) -> Tensor:
    """Compute ``1 - cos(w, w_k)`` for every client.

    Args:
        vectors: The K received models.
        start: ``[P]``, the model that was broadcast.

    Returns:
        ``[K]`` float64; 1 where one of the models is zero.
    """
    lengths = vectors.norms() * dot(start, start).sqrt()  # [K]
    return 1 - torch.where(lengths > 0, vectors.inner(start) / lengths, 0.0)


def share_gradient(updates: CohortVectors, shares: Tensor, distances: Tensor) -> Tensor:
    """Compute the derivative of ``L`` with respect to the shares, up to a constant that cancels in the softmax.

    With ``m = sum_j s_j d_j`` and ``r_k = |d_k - m|`` it is ``distances_k + r_k - <d_k, sum_j s_j (d_j - m) / r_j>``.

    Args:
        updates: The K displacements.
        shares: ``[K]``.
        distances: ``[K]``, those of the models from the broadcast one.

    Returns:
        ``[K]`` float64.
    """
    mean = updates.weighted_sum(shares)  # [P]
    spread = updates.distances(mean)  # [K]
    # An update that equals the mean has no direction away from it; its summand of the derivative is zero.
    factors = torch.where(spread > 0, shares / spread, 0.0)  # [K]
    pull = updates.weighted_sum(factors) - factors.sum().to(mean) * mean  # [P]
    return distances + spread - updates.inner(pull)


class FedAWACallback(GuardedRule):
    """Learn each client's weight so that the weighted updates agree with their mean.

    Args:
        lr: Learning rate of the logits.
        server_epochs: Steps of the optimizer in a round; 0 is FedAvg.
        optimizer: Makes it from ``([logits], lr=...)``, new in every round. Default: ``Adam(betas=(0.5, 0.999))``, with
            which a single step moves every logit by ``lr``.
        guard: Whether the plain average replaces a model that has collapsed, as in :class:`FedHAWCallback`. Default:
            no, as published.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``logits`` [N] in float64.

    Raises:
        ValueError: If an argument is not one of the allowed values.
        TypeError: If ``optimizer`` makes no optimizer that steps on a given gradient.
    """

    key = "FedAWACallback"

    takes_substitutes = False

    summary_metrics = ("weight/min", "weight/max")

    def __init__(
        self,
        lr: float = 1e-3,
        *,
        server_epochs: int = 1,
        optimizer: OptimizerFactory = ADAM,
        guard: bool = False,
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.lr = arguments.number("lr", lr, above=0)
        self.server_epochs = arguments.integer("server_epochs", server_epochs, minimum=0)
        check_optimizer("optimizer", optimizer, self.lr)
        self.optimizer = optimizer
        self.guard = arguments.flag("guard", guard)

    def summary(self) -> dict[str, float]:
        """Return the rounds in which the guard stepped in."""
        return self.guard_summary()

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Return logits with which the weights are those of FedAvg."""
        return {"logits": normalized(num_examples).log()}

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Step the logits of the cohort's clients, and average the models with the weights that follow."""
        logits = self._learned(cohort, state["logits"])  # [N]
        weights = torch.softmax(logits[cohort.clients], 0)  # [K]
        metrics = {
            "weight/min": weights.min().item(),
            "weight/max": weights.max().item(),
            "weight/effective_clients": (1 / weights.square().sum()).item(),
        }
        output = RuleOutput(cohort.vectors.weighted_sum(weights), {"logits": logits}, weights, metrics)
        return self.guarded(output, cohort, state, server)

    def _learned(self, cohort: Cohort, logits: Tensor) -> Tensor:
        """Return the logits ``[N]`` after this round's steps; those of absent clients stay."""
        variable = logits[cohort.clients].clone().requires_grad_()  # [K]
        optimizer = self.optimizer([variable], lr=self.lr)
        if self.server_epochs:
            distances = model_distances(cohort.vectors, cohort.start)  # [K]
        for _ in range(self.server_epochs):
            shares = torch.softmax(variable.detach(), 0)  # [K]
            gradient = share_gradient(cohort.vectors.displacements, shares, distances)  # [K]
            variable.grad = shares * (gradient - (shares * gradient).sum())
            optimizer.step()
        stepped = logits.clone()
        stepped[cohort.clients] = variable.detach()
        return learned_logits(logits, stepped, cohort.clients)

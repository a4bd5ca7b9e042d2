"""FedVG: weigh clients by how flat the loss of the server's data is at their models.

A. Devkota, J. Thrasher, D. Adjeroh, B. Bhattarai, P. K. Gyawali: FedVG: Gradient-Guided Aggregation for Enhanced
Federated Learning. CVPR Findings 2026; formulas and defaults as in the authors' code (mode ``clientwise``).

With the received models ``w_k`` [P] and the training loss ``L`` on proxy data::

    g_k = sum over parameter tensors l of |grad_l L(w_k)|_1
    s_k = 1 / (g_k + 1e-8),  normalized to sum to one
    w  <- sum_k s_k w_k

Numbers of examples play no part, unless ``examples`` mixes them in; the authors' code calls the mean of both
``fedgradavg``.

Shapes: K clients are in the cohort, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule, normalized
from lightning_fedhaw.aggregation.proxy import batches
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import RuleOutput, ServerView, State

EPS = 1e-8
"""Keeps the weight of a client finite whose model has no gradient at all."""


def flatness(scores: Tensor) -> Tensor:
    """Return weights that are inverse to scores.

    Args:
        scores: ``[K]``, sums of gradient norms; a client whose score is not finite gets the weight 0.

    Returns:
        ``[K]`` float64, summing to one.

    Raises:
        ZeroDivisionError: If no score is finite.
    """
    inverse = 1 / (scores.to(torch.float64) + EPS)
    return normalized(torch.where(torch.isfinite(scores), inverse, 0.0))


class FedVGCallback(AggregationRule):
    """Weigh clients by the inverse size of the gradient of their models on the server's data.

    The data comes from ``FederatedDataModule(proxy=...)``. Gradients are those of ``training_step``.

    Args:
        order: The order of the norms; 1 as in the authors' code, 2 for Euclidean ones.
        examples: The share of the weights by examples that is mixed in: 0 for none, 0.5 for the mean of both.
        batch_size: Proxy samples of a pass at most; it bounds memory, and changes nothing else.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If an argument is not one of the allowed values; when ``fit`` begins, if there is no proxy data.
    """

    key = "FedVGCallback"

    takes_substitutes = False

    summary_metrics = ("weight/min", "weight/max")

    def __init__(self, order: float = 1.0, *, examples: float = 0.0, batch_size: int = 128, **federation: Any) -> None:
        super().__init__(**federation)
        self.order = arguments.number("order", order, minimum=1)
        self.examples = arguments.number("examples", examples, minimum=0, maximum=1)
        self.batch_size = arguments.integer("batch_size", batch_size, minimum=1)

    def check(self, server: ServerView) -> None:
        """Try the loss on proxy data."""
        server.check_proxy(type(self).__name__, server.loss)

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Compute the gradient at every received model, and average the models with the weights that follow."""
        shares = normalized(cohort.example_weights)  # [K]
        scores = torch.tensor([self._score(vector, server) for vector in _models(cohort)], dtype=torch.float64)  # [K]
        try:
            weights = (1 - self.examples) * flatness(scores) + self.examples * shares  # [K]
        except ZeroDivisionError:
            weights = shares
            rank_zero_warn(
                f"FedVG found no client whose gradient on the proxy data is finite in round {cohort.round}: the round"
                " is FedAvg's. Look for what is not finite in the proxy data, such as batches without a label that"
                " counts."
            )
        metrics = {
            "gradient_norm/min": scores.min().item(),
            "gradient_norm/max": scores.max().item(),
            "weight/min": weights.min().item(),
            "weight/max": weights.max().item(),
        }
        return RuleOutput(cohort.vectors.weighted_sum(weights), state, weights, metrics)

    def _score(self, vector: Tensor, server: ServerView) -> float:
        """Return the sum over parameter tensors of the norms of the mean gradient at a model ``[P]``."""
        variable = vector.detach().requires_grad_()
        total = torch.zeros_like(vector)
        count = len(server.proxy_dataset)
        for index, batch in batches(server, self.batch_size):
            with torch.enable_grad():
                loss = server.loss(variable, batch)
            (gradient,) = torch.autograd.grad(loss, variable)
            total += gradient * (len(index) / count)
        norms = []
        for part in server.layout.views(total).values():
            norms.append(torch.linalg.vector_norm(part, self.order))
        return float(torch.stack(norms).sum())


def _models(cohort: Cohort) -> Iterable[Tensor]:
    """Yield the received models, one ``[P]`` at a time."""
    for slot in range(len(cohort)):
        only = torch.zeros(len(cohort), dtype=torch.float64)
        only[slot] = 1.0
        yield cohort.vectors.weighted_sum(only).to(cohort.start)

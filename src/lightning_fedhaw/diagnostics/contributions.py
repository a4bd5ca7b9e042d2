"""Contributions: which clients moved the model, by what the loss would be without them.

A. Ghorbani, J. Zou: Data Shapley: Equitable Valuation of Data for Machine Learning. arXiv:1904.02868.

Shapes: N clients exist, K of them are in the cohort.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.diagnostics.base import check_single_updates
from lightning_fedhaw.diagnostics.held_out import HeldOutDiagnostic, HeldOutLoss, Source
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.observation import Aggregated
from lightning_fedhaw.streams import stream
from lightning_fedhaw.vectors.client_vectors import ClientVectors
from lightning_fedhaw.vectors.distributed import SpreadVectors

CoalitionLoss = Callable[[Tensor], float]
"""``loss(weights [K])`` returns the loss of the mean of some clients' models; all weights are 0 for none of them."""


def coalition_weights(weights: Tensor, members: Tensor) -> Tensor:
    """Return the weights ``[K]`` of some clients among themselves; 0 for all others.

    Args:
        weights: ``[K]``, the weights of all clients.
        members: ``[K]`` bool, the clients of the coalition. Where all their weights are 0, they get none.
    """
    kept = torch.where(members, weights, 0.0)
    total = kept.sum()
    if total <= 0:
        return torch.zeros_like(kept)
    return kept / total


def leave_one_out(loss: CoalitionLoss, weights: Tensor) -> Tensor:
    """Compute by how much the loss would be larger without each client, ``[K]``; K + 1 losses.

    Args:
        loss: The loss of a coalition.
        weights: ``[K]``, the weights of the clients, which sum to one.
    """
    everyone = loss(weights)
    contributions = torch.zeros(len(weights), dtype=torch.float64)
    for client in range(len(weights)):
        members = torch.ones(len(weights), dtype=torch.bool)
        members[client] = False
        contributions[client] = loss(coalition_weights(weights, members)) - everyone
    return contributions


@dataclass(frozen=True)
class ShapleyValues:
    """Shapley values from random orders of the clients.

    Attributes:
        values: ``[K]`` float64, by how much each client lowers the loss, on average over orders. They sum to what all
            clients lower it together, up to what truncation leaves out.
        errors: ``[K]`` float64, their standard errors; NaN of a single order.
        evaluations: The losses that were computed.
    """

    values: Tensor
    errors: Tensor
    evaluations: int


def shapley_values(
    loss: CoalitionLoss, weights: Tensor, permutations: int, generator: torch.Generator, tolerance: float = 0.0
) -> ShapleyValues:
    """Estimate Shapley values by truncated Monte Carlo.

    Clients join one after the other in a random order, and each gets by how much the loss falls when it joins. An order
    is cut off where what is left to gain is small: the clients after that get 0.

    Args:
        loss: The loss of a coalition.
        weights: ``[K]``, the weights of the clients, which sum to one.
        permutations: The number of orders.
        generator: Draws the orders, on the CPU.
        tolerance: The share of the whole gain below which what is left is small; 0 cuts off nothing.
    """
    count = len(weights)
    nobody = loss(torch.zeros_like(weights))
    everyone = loss(weights)
    small = tolerance * abs(nobody - everyone)
    evaluations = 2
    marginals = torch.zeros(permutations, count, dtype=torch.float64)
    for row in marginals:
        members = torch.zeros(count, dtype=torch.bool)
        before = nobody
        order = torch.randperm(count, generator=generator).tolist()
        for position, client in enumerate(order):
            if abs(everyone - before) < small:
                break
            members[client] = True
            after = everyone
            if position + 1 < count:
                after = loss(coalition_weights(weights, members))
                evaluations += 1
            row[client] = before - after
            before = after
    errors = torch.full((count,), nan, dtype=torch.float64)
    if permutations > 1:
        errors = marginals.std(0) / permutations**0.5
    return ShapleyValues(marginals.mean(0), errors, evaluations)


class Contributions(HeldOutDiagnostic):
    """Measures what each client of a cohort contributes to a lower loss on validation or proxy data.

    The model of some clients is the mean of their models with the rule's weights among themselves; a scale or another
    step of the rule after the mean is not part of it. The model of nobody is the one that was broadcast, with the
    buffers of the new one.

    It logs ``diagnostics/contributions/loss``, that of the mean of all, and keeps tables of the clients in
    ``diagnostics/contributions/clients``, in their order. A positive number means that the client lowers the loss:

    - ``diagnostics/contributions/leave_one_out``: the loss without the client, minus that with all;
    - ``diagnostics/contributions/shapley`` and ``shapley_error``, with ``permutations``: the Shapley value, by
      truncated Monte Carlo, and its standard error.

    Args:
        every_n_rounds: It measures after every n-th round.
        data: Whether the loss is on ``"validation"`` or on ``"proxy"`` data.
        samples: The samples of the loss at most, drawn once.
        batch_size: Samples that are computed at once at most.
        permutations: The random orders of the clients for Shapley values; 0 for none.
        tolerance: The share of the whole gain below which the rest of an order is cut off.
    """

    def __init__(
        self,
        every_n_rounds: int = 1,
        *,
        data: Source = "validation",
        samples: int = 512,
        batch_size: int = 256,
        permutations: int = 0,
        tolerance: float = 0.01,
    ) -> None:
        super().__init__(every_n_rounds, data, samples, batch_size)
        self.permutations = arguments.integer("permutations", permutations, minimum=0)
        self.tolerance = arguments.number("tolerance", tolerance, minimum=0, below=1)

    def check(self, federation: Federation) -> None:
        """Refuse a federation that keeps only the sum of the updates."""
        check_single_updates(type(self).__name__, federation)
        super().check(federation)

    def prepare(self, federation: Federation, loss: HeldOutLoss) -> None:
        """Say what contributions cost."""
        cohort = len(federation.cohort(0))
        most = cohort + 2
        if self.permutations:
            most += 2 + self.permutations * (cohort - 1)
        rank_zero_info(
            f"{type(self).__name__}: after every {self.every_n_rounds} rounds at most {most} losses of"
            f" {loss.samples} samples with {cohort} clients, each a weighted sum of their models and a forward pass."
        )

    def measure(self, aggregated: Aggregated) -> None:
        """Compute the contributions of the cohort's clients."""
        weights = aggregated.weights
        loss = coalition_loss(self.loss, aggregated)
        aggregated.log("contributions/loss", loss(weights))
        aggregated.keep("contributions/clients", aggregated.cohort.clients)
        aggregated.keep("contributions/leave_one_out", leave_one_out(loss, weights))
        if self.permutations:
            generator = stream(aggregated.server.seed, "round", aggregated.round, "shapley")
            shapley = shapley_values(loss, weights, self.permutations, generator, self.tolerance)
            aggregated.keep("contributions/shapley", shapley.values)
            aggregated.keep("contributions/shapley_error", shapley.errors)


def coalition_loss(loss: HeldOutLoss, aggregated: Aggregated) -> CoalitionLoss:
    """Return the loss of the mean of some clients' models, with their buffers."""
    cohort = aggregated.cohort
    displacements = cohort.vectors.displacements
    if isinstance(displacements, SpreadVectors):
        # Where an order is cut off depends on a loss, and a sum over processes needs all of them.
        displacements = ClientVectors(displacements.gather())

    def loss_of(weights: Tensor) -> float:
        vector = cohort.start + displacements.weighted_sum(weights)
        return loss(vector, aggregated.server.mixed_buffers(cohort.buffers, weights))

    return loss_of

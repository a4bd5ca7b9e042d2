"""The loss over the aggregation weights of three clients.

Z. Li, T. Lin, X. Shang, C. Wu: Revisiting Weighted Aggregation in Federated Learning with Neural Networks.
arXiv:2302.10911.

Shapes: K clients are in the cohort, G points on the simplex.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.diagnostics.base import check_single_updates
from lightning_fedhaw.diagnostics.contributions import coalition_loss, coalition_weights
from lightning_fedhaw.diagnostics.held_out import HeldOutDiagnostic, HeldOutLoss, Source
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.observation import Aggregated

CORNERS = 3


def simplex_grid(resolution: int) -> Tensor:
    """Return all weights of three clients that are multiples of ``1 / resolution``.

    Returns:
        ``[G, 3]`` float64 with ``G = (resolution + 1) (resolution + 2) / 2``; each row sums to one.
    """
    rows = []
    for first in range(resolution + 1):
        for second in range(resolution + 1 - first):
            rows.append([resolution - first - second, first, second])
    return torch.tensor(rows, dtype=torch.float64) / resolution


def barycentric(weights: Tensor) -> Tensor:
    """Return the places ``[..., 2]`` in a triangle with sides of length 1 of weights ``[..., 3]``."""
    x = weights[..., 1] + weights[..., 2] / 2
    y = weights[..., 2] * 0.75**0.5
    return torch.stack([x, y], -1)


class Landscape(HeldOutDiagnostic):
    """Measures the loss of every weighted mean of three clients' models on validation or proxy data.

    After ``diagnostics/landscape/`` it logs the ``minimum`` on a regular grid of weights, and the losses ``fedavg`` and
    ``rule`` at the weights by examples and at those of the rule, both among the three clients. The tables ``losses``
    ``[G]``, ``clients`` ``[3]`` and ``points`` ``[3, 3]`` (the weights of FedAvg, of the rule, and of the minimum) are
    what :func:`draw_landscape` draws. A round in which one of the three has sent nothing is left out.

    Args:
        every_n_rounds: It measures after every n-th round.
        clients: The numbers of the three clients; by default the first three of each cohort.
        resolution: The steps along a side: with 20, the grid has 231 points.
        data: Whether the loss is on ``"validation"`` or on ``"proxy"`` data.
        samples: The samples of the loss at most, drawn once.
        batch_size: Samples that are computed at once at most.
    """

    def __init__(
        self,
        every_n_rounds: int = 10,
        *,
        clients: Sequence[int] | None = None,
        resolution: int = 20,
        data: Source = "validation",
        samples: int = 512,
        batch_size: int = 256,
    ) -> None:
        super().__init__(every_n_rounds, data, samples, batch_size)
        allowed = "three different numbers of clients"
        self.clients = arguments.optional(arguments.integers, "clients", clients, minimum=0, allowed=allowed)
        if self.clients is not None and len({*self.clients}) != CORNERS:
            raise arguments.invalid("clients", allowed, clients)
        self.resolution = arguments.integer("resolution", resolution, minimum=1)

    def check(self, federation: Federation) -> None:
        """Refuse a federation without three clients, or that keeps only the sum of the updates."""
        name = type(self).__name__
        check_single_updates(name, federation)
        cohort = len(federation.cohort(0))
        if cohort < CORNERS:
            raise ValueError(
                f"`{name}` needs three clients a round, and {cohort} take part: raise `clients_per_round` or"
                f" `num_clients`, or remove `{name}`."
            )
        num_clients = federation.data.num_clients
        if self.clients is not None and max(self.clients) >= num_clients:
            raise arguments.invalid("clients", f"numbers below {num_clients}, that of the clients", self.clients)
        super().check(federation)

    def prepare(self, federation: Federation, loss: HeldOutLoss) -> None:
        """Say what a landscape costs."""
        points = len(simplex_grid(self.resolution)) + 2
        rank_zero_info(
            f"{type(self).__name__}: after every {self.every_n_rounds} rounds {points} losses of {loss.samples}"
            " samples, each a weighted sum of models and a forward pass."
        )

    def measure(self, aggregated: Aggregated) -> None:
        """Compute the loss at every point of the grid."""
        positions = self._positions(aggregated)
        if positions is None:
            return
        loss = coalition_loss(self.loss, aggregated)

        def loss_at(corners: Tensor) -> float:
            weights = torch.zeros(len(aggregated.cohort), dtype=torch.float64)
            weights[positions] = corners
            return loss(weights)

        grid = simplex_grid(self.resolution)
        losses = torch.tensor([loss_at(corners) for corners in grid], dtype=torch.float64)
        everyone = torch.ones(CORNERS, dtype=torch.bool)
        fedavg = coalition_weights(aggregated.cohort.example_weights.double()[positions], everyone)
        rule = coalition_weights(aggregated.weights[positions], everyone)
        best = int(losses.argmin())
        aggregated.log("landscape/minimum", float(losses[best]))
        aggregated.log("landscape/fedavg", loss_at(fedavg))
        aggregated.log("landscape/rule", loss_at(rule))
        aggregated.keep("landscape/losses", losses)
        aggregated.keep("landscape/clients", aggregated.cohort.clients[positions])
        aggregated.keep("landscape/points", torch.stack([fedavg, rule, grid[best]]))

    def _positions(self, aggregated: Aggregated) -> Tensor | None:
        """Return the places ``[3]`` of the three clients in the cohort; ``None`` if one is not there."""
        numbers = aggregated.cohort.clients.tolist()
        chosen = self.clients or numbers[:CORNERS]
        if len(chosen) < CORNERS or not {*chosen} <= {*numbers}:
            return None
        return torch.tensor([numbers.index(client) for client in chosen])

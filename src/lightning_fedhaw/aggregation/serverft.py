"""Server fine-tuning: average the clients' models, then train the average a little on the server's own samples.

The baseline of that name in Z. Li et al.: Revisiting Weighted Aggregation in Federated Learning with Neural Networks.
ICML 2023, Table 3::

    w <- sum_k p_k w_k, then server_epochs passes of an optimizer on L(w; proxy data)

``L`` is the loss that the module's ``training_step`` returns. Long training overfits the few samples.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_fedhaw.aggregation.base import Weighting, unnormalized_client_weight
from lightning_fedhaw.aggregation.factories import OptimizerFactory, SchedulerFactory
from lightning_fedhaw.aggregation.proxy import ADAM
from lightning_fedhaw.aggregation.servertraining import ServerLoss, ServerTraining
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.rule import ServerView


class ServerFineTuningCallback(ServerTraining):
    """Average, then train on the server's proxy data, from ``FederatedDataModule(proxy=...)``.

    Args:
        server_epochs: Passes over the proxy data each round; 0 is FedAvg.
        batch_size: Proxy samples of a step at most.
        lr: Learning rate of the optimizer.
        optimizer: Makes it from ``([vector], lr=...)``, new in every round. Default: ``Adam(betas=(0.5, 0.999))``.
        scheduler: Makes a schedule that steps once a pass from the optimizer.
        weighting: The average's weights: by ``"examples"``, or ``"uniform"``.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If an argument is not one of the allowed values.
        TypeError: If ``optimizer`` makes no optimizer.
    """

    key = "ServerFineTuningCallback"

    def __init__(
        self,
        server_epochs: int = 2,
        *,
        batch_size: int = 128,
        lr: float = 1e-3,
        optimizer: OptimizerFactory = ADAM,
        scheduler: SchedulerFactory | None = None,
        weighting: Weighting = "examples",
        **federation: Any,
    ) -> None:
        super().__init__(server_epochs, batch_size, lr, optimizer, scheduler, weighting, **federation)

    def unnormalized_weight(self, update: ClientUpdate) -> float:
        """Return a client's weight before normalization."""
        return unnormalized_client_weight(update, self.weighting)

    def check(self, server: ServerView) -> None:
        """Try the loss on proxy data."""
        if self.server_epochs:
            server.check_proxy(type(self).__name__, server.loss)

    def objective(self, cohort: Cohort, weights: Tensor, average: Tensor, server: ServerView) -> ServerLoss:
        """Return the module's own training loss."""
        return lambda vector, index, batch: server.loss(vector, batch)

"""FedDF: average the clients' models, then distil the ensemble of the clients' models into the average.

T. Lin, L. Kong, S. U. Stich, M. Jaggi: Ensemble Distillation for Robust Model Fusion in Federated Learning. NeurIPS
2020. With the clients' logits ``z_k(b)`` of a proxy batch ``b``::

    w <- sum_k p_k w_k, then an optimizer on KL(softmax(mean_k z_k(b)) || softmax(z(w; b)))

Labels are not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_fedhaw.aggregation.base import Weighting
from lightning_fedhaw.aggregation.factories import OptimizerFactory, SchedulerFactory
from lightning_fedhaw.aggregation.proxy import ADAM
from lightning_fedhaw.aggregation.servertraining import Distillation, Ensemble, Teacher, client_models
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import PredictionFunction, ServerView


class FedDFCallback(Distillation):
    """Average, then distil the clients' models into the average on proxy data, from ``FederatedDataModule(proxy=...)``.

    Teachers are in evaluation mode, each with the buffers that its client sent. Their predictions are computed once a
    round.

    Args:
        server_epochs: Passes over the proxy data each round; 0 is FedAvg.
        batch_size: Proxy samples of a step at most.
        lr: Learning rate of the optimizer.
        optimizer: Makes it from ``([vector], lr=...)``, new in every round. Default: ``Adam(betas=(0.5, 0.999))``.
        scheduler: Makes a schedule that steps once a pass from the optimizer.
        weighting: The average's weights: by ``"examples"``, or ``"uniform"``. Teachers count equally.
        ensemble: Whether the teachers' ``"logits"`` are averaged, as published, or their ``"probabilities"``.
        logits: ``logits(module, batch)`` returns a model's logits ``[batch, ..., classes]``. Default: the module's
            ``forward`` of the batch, of its first element where it is a tuple or a list.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If an argument is not one of the allowed values.
        TypeError: If ``optimizer`` makes no optimizer.
    """

    key = "FedDFCallback"

    def __init__(
        self,
        server_epochs: int = 100,
        *,
        batch_size: int = 128,
        lr: float = 1e-3,
        optimizer: OptimizerFactory = ADAM,
        scheduler: SchedulerFactory | None = None,
        weighting: Weighting = "examples",
        ensemble: Ensemble = "logits",
        logits: PredictionFunction | None = None,
        **federation: Any,
    ) -> None:
        super().__init__(
            ensemble=ensemble,
            logits=logits,
            server_epochs=server_epochs,
            batch_size=batch_size,
            lr=lr,
            optimizer=optimizer,
            scheduler=scheduler,
            weighting=weighting,
            **federation,
        )

    def teachers(self, cohort: Cohort, weights: Tensor, average: Tensor, server: ServerView) -> Iterable[Teacher]:
        """Return the clients' models."""
        return client_models(cohort, cohort.vectors.displacements.gather())

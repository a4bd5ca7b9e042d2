"""FedBE: distil a Bayesian ensemble around the clients' models into their average.

H.-Y. Chen, W.-L. Chao: FedBE: Making Bayesian Model Ensemble Applicable to Federated Learning. ICLR 2021, with the
Gaussian sampling of the FedLAW authors' code. For one tensor, with the clients' displacements ``d_k`` from the model
that was broadcast, and ``e ~ N(0, I)``::

    M = mean_k d_k / |d_k|      V = clip(mean_k (d_k / |d_k|)^2 - M^2, min 1e-5)
    sample = start + mean_k |d_k| (M + 0.1 sqrt(V) e)

The teachers are the average, the clients' models and the samples; the rest is FedDF.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import Weighting
from lightning_fedhaw.aggregation.factories import OptimizerFactory, SchedulerFactory
from lightning_fedhaw.aggregation.proxy import ADAM
from lightning_fedhaw.aggregation.servertraining import Distillation, Ensemble, Teacher, client_models
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import PredictionFunction, ServerView
from lightning_fedhaw.streams import stream
from lightning_fedhaw.vectors.layout import ParameterLayout

VARIANCE_FLOOR = 1e-5
"""The least variance of a direction's elements, below which the FedLAW authors' code does not go."""

SPREAD = 0.1
"""The factor on the standard deviation of a sample, as in that code."""


def swag(displacements: Tensor, noise: Tensor) -> Tensor | None:
    """Draw a model from the Gaussian around the clients' models, for one tensor.

    Args:
        displacements: ``[K, size]``.
        noise: ``[size]``, standard normal.

    Returns:
        ``[size]``, a displacement; ``None`` where a client did not change the tensor, and so has no direction.
    """
    lengths = torch.linalg.vector_norm(displacements, dim=1)  # [K]
    if not lengths.all():
        return None
    directions = displacements / lengths[:, None]  # [K, size]
    mean = directions.mean(0)  # [size]
    variance = (directions.square().mean(0) - mean.square()).clamp(min=VARIANCE_FLOOR)  # [size]
    sample: Tensor = lengths.mean() * (mean + SPREAD * variance.sqrt() * noise)
    return sample


class FedBECallback(Distillation):
    """Average, then distil clients, average and sampled models into the average on proxy data.

    Args:
        server_epochs: Passes over the proxy data each round; 0 is FedAvg.
        samples: Number of sampled models: one as in the FedLAW authors' code; the original takes about ten.
        batch_size: Proxy samples of a step at most.
        lr: Learning rate of the optimizer.
        optimizer: Makes it from ``([vector], lr=...)``, new in every round. Default: ``Adam(betas=(0.5, 0.999))``.
        scheduler: Makes a schedule that steps once a pass from the optimizer.
        weighting: The average's weights: by ``"examples"``, or ``"uniform"``. Teachers count equally.
        ensemble: Whether the teachers' ``"logits"`` are averaged, as in the FedLAW authors' code, or their
            ``"probabilities"``, as in the original.
        logits: As in :class:`~lightning_fedhaw.FedDFCallback`.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If an argument is not one of the allowed values.
        TypeError: If ``optimizer`` makes no optimizer.
    """

    key = "FedBECallback"

    def __init__(
        self,
        server_epochs: int = 100,
        *,
        samples: int = 1,
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
        self.samples = arguments.integer("samples", samples, minimum=0)

    def teachers(self, cohort: Cohort, weights: Tensor, average: Tensor, server: ServerView) -> Iterable[Teacher]:
        """Yield the average, the clients' models and the samples, which have the buffers of the average."""
        displacements = cohort.vectors.displacements.gather().to(cohort.start)  # [K, P]
        buffers = server.mixed_buffers(cohort.buffers, weights)
        yield average, buffers
        yield from client_models(cohort, displacements)
        for number in range(self.samples):
            generator = stream(server.seed, "server", "round", cohort.round, "sample", number)
            # Drawn on the CPU, so that every device gets the same numbers.
            noise = torch.randn(len(average), generator=generator).to(displacements)  # [P]
            yield _sampled_model(average, cohort.start, displacements, noise, server.layout), buffers


def _sampled_model(
    average: Tensor, start: Tensor, displacements: Tensor, noise: Tensor, layout: ParameterLayout
) -> Tensor:
    """Draw a model ``[P]`` tensor by tensor; a tensor without directions is the average's.

    Args:
        average: ``[P]``.
        start: ``[P]``, the model that was broadcast.
        displacements: ``[K, P]``.
        noise: ``[P]``, standard normal.
        layout: The place of each tensor in the vector.
    """
    model = average.clone()
    start_views = layout.views(start)
    displacement_views = layout.views(displacements)
    noise_views = layout.views(noise)
    for name, tensor in layout.views(model).items():
        # Not `flatten`: a parameter may be a single number, and have no dimension.
        clients = displacement_views[name].reshape(len(displacements), -1)
        displacement = swag(clients, noise_views[name].reshape(-1))
        if displacement is not None:
            tensor.copy_(start_views[name] + displacement.view_as(tensor))
    return model

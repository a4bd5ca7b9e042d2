"""FedBE: distil a Bayesian ensemble around the clients' models into their average.

H.-Y. Chen, W.-L. Chao: FedBE: Making Bayesian Model Ensemble Applicable to Federated Learning. ICLR 2021, with the
Gaussian sampling of the FedLAW authors' code. For one tensor, with the clients' displacements ``d_k`` from the model
that was broadcast, and ``e ~ N(0, I)``::

    M = mean_k d_k / |d_k|      V = clip(mean_k (d_k / |d_k|)^2 - M^2, min 1e-5)
    sample = start + mean_k |d_k| (M + 0.1 sqrt(V) e)

The teachers are the average, the clients' models and the samples; the rest is FedDF.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.proxy import ADAM, OptimizerFactory
from lightning_fedhaw.aggregation.servertraining import Distillation, Ensemble, Teacher, Weighting, client_models
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.rule import ServerView
from lightning_fedhaw.streams import stream

VARIANCE_FLOOR, SPREAD = 1e-5, 0.1


def swag(displacements: Tensor, noise: Tensor) -> Tensor | None:
    """A sample of one tensor, as a displacement.

    Args:
        displacements: ``[K, size]``.
        noise: ``[size]``, standard normal.

    Returns:
        ``[size]``; ``None`` where a client did not change the tensor, and so has no direction.
    """
    lengths = torch.linalg.vector_norm(displacements, dim=1)
    if not lengths.all():
        return None
    directions = displacements / lengths[:, None]
    mean = directions.mean(0)
    variance = (directions.square().mean(0) - mean.square()).clamp(min=VARIANCE_FLOOR)
    sample: Tensor = lengths.mean() * (mean + SPREAD * variance.sqrt() * noise)
    return sample


class FedBECallback(Distillation):
    """Average, then distil clients, average and sampled models into the average on proxy data.

    Args:
        server_epochs: Passes over the proxy data each round; 0 is FedAvg.
        samples: Models that are sampled: one as in the FedLAW authors' code; the original takes about ten.
        batch_size: Proxy samples of a step at most.
        lr: Rate of the optimizer.
        optimizer: Makes it from ``([vector], lr=...)``; it begins anew every round. ``Adam(betas=(0.5, 0.999))``.
        scheduler: Makes a schedule that steps once a pass from the optimizer.
        weighting: The average's weights: by ``"examples"``, or ``"uniform"``. Teachers count equally.
        ensemble: Whether the teachers' ``"logits"`` are averaged, as in the FedLAW authors' code, or their
            ``"probabilities"``, as in the original.
        logits: As in :class:`~lightning_fedhaw.FedDFCallback`.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If an argument is not one of the allowed values.
        TypeError: If ``optimizer`` makes none.
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
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        weighting: Weighting = "examples",
        ensemble: Ensemble = "logits",
        logits: Callable[[Any, Any], Tensor] | None = None,
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
        """The average, the clients' models and the samples; these have the buffers of the average."""
        displacements = cohort.vectors.displacements.gather().to(cohort.start)
        buffers = server.mixed_buffers(cohort.buffers, weights)
        yield average, buffers
        yield from client_models(cohort, displacements)
        for number in range(self.samples):
            draws = stream(server.seed, "server", "round", cohort.round, "sample", number)
            noise = torch.randn(len(average), generator=draws).to(displacements)
            sample = average.clone()
            parts = (server.layout.views(v).values() for v in (sample, cohort.start, displacements, noise))
            for target, start, moved, own in zip(*parts, strict=True):
                found = swag(moved.flatten(1), own.flatten())
                if found is not None:
                    target.copy_(start + found.view_as(start))
            yield sample, buffers

"""pfl-research: ``FederatedAveraging`` in its ``SimulatedBackend``. It keeps a client's batches and never shuffles."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch.nn.functional import cross_entropy
from workloads import Clock, Job, run_contender, train_loss


class Rounds(TrainingProcessCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def after_central_iteration(self, *_: object, **__: object) -> tuple[bool, Metrics]:
        self.clock.tick()
        return False, Metrics()


def play(job: Job) -> tuple[Clock, Callable[[], float]]:
    work = job.workload
    x, y = job.samples()
    clients = [PyTorchTensorDataset((x[rows], y[rows]), user_id=str(k)) for k, rows in enumerate(job.rows)]
    visits = (client for cohort in job.cohorts for client in cohort)
    model = job.network()
    model.loss = types.MethodType(lambda self, a, b: cross_entropy(self(a), b), model)
    model.metrics = types.MethodType(lambda self, a, b: {"loss": Weighted(0.0, 1)}, model)
    clock = Clock()
    clock.tick()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(job.rounds, 10**9, work.cohort, 0),
        backend=SimulatedBackend(
            FederatedDataset(clients.__getitem__, lambda: next(visits)), None, postprocessors=[WeightByDatapoints()]
        ),
        model=PyTorchModel(model, torch.optim.SGD, torch.optim.SGD(model.parameters(), lr=1.0)),
        model_train_params=NNTrainHyperParams(
            local_learning_rate=work.lr, local_num_epochs=work.epochs, local_batch_size=work.batch
        ),
        callbacks=[Rounds(clock)],
        send_metrics_to_platform=False,
    )
    return clock, lambda: train_loss(model, x, y)


if __name__ == "__main__":
    run_contender(play, "pfl")

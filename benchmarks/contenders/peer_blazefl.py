"""BlazeFL: its sequential ``FedAvgBaseClientTrainer`` and server handler (its pools are slower on these workloads)."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from blazefl.contrib import FedAvgBaseClientTrainer, FedAvgBaseServerHandler
from torch.utils.data import DataLoader, TensorDataset
from workloads import Clock, Job, run_contender, train_loss


class Models:
    def __init__(self, job: Job) -> None:
        self.job = job

    def select_model(self, model_name: Enum) -> torch.nn.Module:
        return self.job.network()


class Data:
    """BlazeFL's ``PartitionedDataset``."""

    def __init__(self, job: Job) -> None:
        x, y = job.samples()
        self.clients = [TensorDataset(x[rows], y[rows]) for rows in job.rows]

    def get_dataset(self, type_: Enum, cid: int) -> TensorDataset:
        return self.clients[cid]

    def get_dataloader(self, type_: Enum, cid: int, batch_size: int, generator: Any = None) -> DataLoader[Any]:
        return DataLoader(self.clients[cid], batch_size=batch_size, shuffle=True, generator=generator)


def play(job: Job) -> tuple[Clock, Callable[[], float]]:
    work, models, data = job.workload, Models(job), Data(job)
    many = len(work.sizes)
    shared = {"model_selector": models, "model_name": "net", "dataset": data, "device": "cpu", "seed": 0}
    handler = FedAvgBaseServerHandler(
        **shared, global_round=job.rounds, num_clients=many, sample_ratio=work.cohort / many, batch_size=work.batch
    )
    trainer = FedAvgBaseClientTrainer(**shared, num_clients=many, epochs=work.epochs, batch_size=work.batch, lr=work.lr)
    clock = Clock()
    clock.tick()
    for cohort in job.cohorts:
        trainer.local_process(handler.downlink_package(), cohort)
        for package in trainer.uplink_package():
            handler.load(package)
        clock.tick()
    return clock, lambda: train_loss(handler.model, *job.samples())


if __name__ == "__main__":
    run_contender(play, "blazefl")

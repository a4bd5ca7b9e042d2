"""Flower: ``FedAvg`` in its Ray simulation, one actor with one thread per core. It samples its own cohorts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from workloads import Clock, Job, job_of, run_contender, train_loss

client_app, server_app = ClientApp(), ServerApp()
clock = Clock()
ended: dict[str, Any] = {}


@client_app.train()
def train(message: Message, context: Context) -> Message:
    job = job_of(os.environ["JOB"])
    work, (x, y), rows = job.workload, job.samples(), job.rows[int(context.node_config["partition-id"])]
    torch.set_num_threads(1)
    model = job.network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr)
    samples = TensorDataset(x[rows], y[rows])
    for _ in range(work.epochs):
        for inputs, labels in DataLoader(samples, batch_size=work.batch, shuffle=True):
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(rows)})}
    return Message(content=RecordDict(content), reply_to=message)


class Timed(FedAvg):
    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
        clock.tick()
        return super().configure_train(server_round, arrays, config, grid)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    job = job_of(os.environ["JOB"])
    work = job.workload
    strategy = Timed(
        fraction_train=work.cohort / len(work.sizes), fraction_evaluate=0.0, min_available_nodes=len(work.sizes)
    )
    result = strategy.start(grid, ArrayRecord(job.network().state_dict()), num_rounds=job.rounds)
    clock.stop()
    ended.update(result.arrays.to_torch_state_dict())


def play(job: Job) -> tuple[Clock, Callable[[], float]]:
    run_simulation(
        server_app,
        client_app,
        num_supernodes=len(job.workload.sizes),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"log_to_driver": False, "_node_ip_address": "127.0.0.1"},
        },
    )
    model = job.network()
    model.load_state_dict(ended)
    return clock, lambda: train_loss(model, *job.samples())


if __name__ == "__main__":
    os.environ["JOB"] = sys.argv[1]  # Ray's workers inherit it
    run_contender(play, "flwr", "ray")

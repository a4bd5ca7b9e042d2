"""An ordinary LightningModule with ``self.log`` in its step, through ``FederatedTrainer``.

The job's options are arguments of ``FederatedTrainer``. In addition, ``rule`` is a name in :data:`RULES` instead of
``"fedavg"``, and ``logged=True`` adds a CSV logger and a progress bar.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from workloads import Clock, Job, run_contender, train_loss

from lightning_fedhaw import (
    FedAvgCallback,
    FederatedCallback,
    FederatedDataModule,
    FederatedTrainer,
    FedHAWCallback,
    FedOptCallback,
)
from lightning_fedhaw.data import FixedSequenceSampler, IndexPartitioner

RULES = {
    "fedavg": FedAvgCallback,
    "fedhaw": FedHAWCallback,
    "learned server rate": partial(FedOptCallback, lr=1.0, learn=("lr",)),
}


class Module(pl.LightningModule):
    def __init__(self, net: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Rounds(FederatedCallback):
    """Tick at the start of each round and after the last one, so that the times include everything."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def on_round_start(self, *_: Any) -> None:
        self.clock.tick()

    def on_round_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or self.clock.is_over

    def on_train_end(self, *_: Any) -> None:
        self.clock.stop()


def fit(job: Job, clock: Clock) -> tuple[FederatedTrainer, Module]:
    """Train for the job's rounds; the module then has the global model."""
    work, options = job.workload, dict(job.options)
    logged = options.pop("logged", False)
    rule = RULES[options.pop("rule", "fedavg")]()
    settings: dict[str, Any] = {
        "rounds": job.rounds,
        "sampler": FixedSequenceSampler(job.cohorts),
        "local_epochs": work.epochs,
        "callbacks": [rule, Rounds(clock)],
        "client_eval": False,
        "accelerator": job.device.split(":")[0],
        "devices": 1,
        "precision": job.precision,
        "logger": pl.loggers.CSVLogger(tempfile.mkdtemp()) if logged else False,
        "enable_checkpointing": False,
        "enable_progress_bar": logged,
        "enable_model_summary": False,
    }
    trainer = FederatedTrainer(**{**settings, **options})
    module = Module(job.network(), work.lr)
    samples = TensorDataset(*job.samples())
    trainer.fit(module, FederatedDataModule(samples, partitioner=IndexPartitioner(job.rows), batch_size=work.batch))
    return trainer, module


def play(job: Job) -> tuple[Clock, Callable[[], float]] | None:
    clock = job.clock()
    trainer, module = fit(job, clock)
    if trainer.global_rank:
        return None
    return clock, lambda: train_loss(module.net.cpu(), *job.samples())


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    run_contender(play, "lightning", "lightning-fedhaw")

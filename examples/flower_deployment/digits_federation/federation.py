"""What server and sites have in common: the trainer and the model. The data is the sites' own."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_fedhaw import DirichletPartitioner, FedAvgCallback, FederatedTrainer, FedHAWCallback, ScaffoldCallback

NUM_SITES = 3
RULES = {
    "FedAvg": FedAvgCallback,
    # With a learned weight for each site.
    "FedHAW": partial(FedHAWCallback, lr_lambda=0.3),
    "SCAFFOLD": ScaffoldCallback,
}


class DigitClassifier(pl.LightningModule):
    """An ordinary LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            # The same initial model everywhere.
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        predictions = self.net(batch[0]).argmax(1)
        self.log("val_acc", (predictions == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(rule: str, rounds: int) -> FederatedTrainer:
    """The trainer of a simulation, of the server and of every site."""
    return FederatedTrainer(
        rounds=rounds,
        local_epochs=2,
        callbacks=[RULES[rule]()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,  # the server side keeps its own
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def samples_of(site: int) -> Subset[Any]:
    """The samples of one site. A real site reads its own; here it takes its part of scikit-learn's digits."""
    pixels, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.as_tensor(pixels / 16.0).float(), torch.as_tensor(labels).long())
    split = DirichletPartitioner(0.5).partition(
        NUM_SITES, num_samples=len(labels), labels=torch.as_tensor(labels).long(), seed=1
    )
    return Subset(dataset, split.indices[site].tolist())


def loader_of(site: int) -> DataLoader[Any]:
    """The training loader of one site."""
    return DataLoader(samples_of(site), batch_size=16, shuffle=True)

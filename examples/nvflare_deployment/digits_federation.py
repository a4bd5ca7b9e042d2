"""The digits federation on NVFlare: everything that server and sites run, in the one file that NVFlare sends them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_fedhaw import DirichletPartitioner, FedAvgCallback, FederatedTrainer, FedHAWCallback, ScaffoldCallback
from lightning_fedhaw.deploy import ClientSide, ServerSide, Sites
from lightning_fedhaw.deploy.nvflare import collab_functions

SITES = ("site-0", "site-1", "site-2")
RULES = {
    "FedAvg": FedAvgCallback,
    # With a learned weight for each site.
    "FedHAW": partial(FedHAWCallback, lr_lambda=0.3),
    "SCAFFOLD": ScaffoldCallback,
}
# The settings of a run; the script that starts all on one machine sets them in the environment of all.
RULE = os.environ.get("DIGITS_RULE", "FedHAW")
ROUNDS = int(os.environ.get("DIGITS_ROUNDS", "3"))
TIMEOUT = float(os.environ.get("DIGITS_TIMEOUT", "600"))
FOLDER = Path(os.environ.get("DIGITS_FOLDER", "digits"))


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


def make_trainer(rule: str = RULE) -> FederatedTrainer:
    """The trainer of a simulation, of the server and of every site."""
    return FederatedTrainer(
        rounds=ROUNDS,
        local_epochs=2,
        callbacks=[RULES[rule]()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,  # the server side keeps its own
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def samples_of(site: str) -> Subset[Any]:
    """The samples of one site. A real site reads its own; here it takes its part of scikit-learn's digits."""
    pixels, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.as_tensor(pixels / 16.0).float(), torch.as_tensor(labels).long())
    split = DirichletPartitioner(0.5).partition(
        len(SITES), num_samples=len(labels), labels=torch.as_tensor(labels).long(), seed=1
    )
    return Subset(dataset, split.indices[SITES.index(site)].tolist())


def loader_of(site: str) -> DataLoader[Any]:
    """The training loader of one site."""
    return DataLoader(samples_of(site), batch_size=16, shuffle=True)


def make_site(name: str) -> ClientSide:
    """Make the client side of the site with this name."""
    return ClientSide(
        make_trainer, DigitClassifier, partial(loader_of, name), memory_folder=FOLDER / f"memory of {name}" / RULE
    )


def make_server(sites: Sites) -> ServerSide:
    """Make the server side, which goes on from its last checkpoint if there is one."""
    return ServerSide(
        make_trainer(),
        DigitClassifier(),
        sites,
        num_sites=len(SITES),
        folder=FOLDER / "server" / RULE,
        wait_timeout=600.0,
        round_timeout=TIMEOUT,
    )


main, answer = collab_functions(make_server, make_site)

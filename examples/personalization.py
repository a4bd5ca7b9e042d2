"""One model for everyone, or one for each client? Four answers, measured on samples that no training has seen.

    python examples/personalization.py

scikit-learn's digits are dealt to ten clients by Dirichlet(0.3), and each client holds out three tenths of its samples.

- Local only: each client trains a model of its own, on its own samples alone.
- Global: FedAvg trains one model for all clients.
- Fine-tuned: each client trains the global model a little further on its own training samples.
- FedPer: FedAvg trains all layers but the last one; every client keeps a last layer of its own
  (`local_parameters="head.*"`).

No download, under a minute on two cores. Prints the accuracy of each client and the mean over clients.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fedhaw import DirichletPartitioner, FedAvgCallback, FederatedDataModule, FederatedTrainer

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


class DigitClassifier(pl.LightningModule):
    """An ordinary LightningModule: nothing in it knows of a federation."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def initial_model(args: argparse.Namespace) -> DigitClassifier:
    """The same initial model for all methods."""
    torch.manual_seed(args.seed)
    return DigitClassifier(args.lr)


def federate(args: argparse.Namespace, **options: Any) -> tuple[DigitClassifier, FederatedTrainer]:
    """Train a federation; the split depends on the seed alone, so it is the same for all methods."""
    pixels, labels = load_digits(return_X_y=True)
    samples = TensorDataset(torch.as_tensor(pixels / 16.0).float(), torch.as_tensor(labels).long())
    data = FederatedDataModule(
        samples,
        num_clients=args.clients,
        partitioner=DirichletPartitioner(args.alpha),
        batch_size=args.batch_size,
        seed=args.seed,
    )
    trainer = FederatedTrainer(
        rounds=args.rounds,
        client_val_fraction=0.3,
        seed=args.seed,
        accelerator="cpu",
        callbacks=[FedAvgCallback()],
        client_eval=False,
        **options,
        **QUIET,
    )
    model = initial_model(args)
    trainer.fit(model, data)
    return model, trainer


def train_alone(model: DigitClassifier, train_set: Dataset[Any], epochs: int, args: argparse.Namespace) -> None:
    """Train a model on one client's training samples with a stock trainer."""
    pl.seed_everything(args.seed, verbose=False)
    model.train()
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", log_every_n_steps=10**6, **QUIET)
    trainer.fit(model, DataLoader(train_set, batch_size=args.batch_size, shuffle=True))


@torch.no_grad()
def accuracy(model: DigitClassifier, held_out: Dataset[Any]) -> float:
    """The share of a client's held-out samples that a model classifies correctly."""
    model.eval()
    images, labels = next(iter(DataLoader(held_out, batch_size=10**6)))
    return (model(images).argmax(1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=0.3, help="Dirichlet concentration: small is unequal")
    parser.add_argument("--fine-tuning-epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for known in (".*does not have many workers", ".*LeafSpec.* is deprecated", ".*GPU available"):
        warnings.filterwarnings("ignore", message=known)

    global_model, federation = federate(args)
    fedper, personal = federate(args, local_parameters="head.*")
    clients = federation.federation_clients
    table: dict[str, list[float]] = {"local only": [], "global": [], "fine-tuned": [], "FedPer": []}
    for client in range(len(clients)):
        train_set = clients.train_set(client)
        held_out = clients.held_out_set(client)

        # As many epochs as the federation made rounds of one epoch each.
        alone = initial_model(args)
        train_alone(alone, train_set, args.rounds, args)
        table["local only"].append(accuracy(alone, held_out))

        table["global"].append(accuracy(global_model, held_out))

        tuned = copy.deepcopy(global_model)
        train_alone(tuned, train_set, args.fine_tuning_epochs, args)
        table["fine-tuned"].append(accuracy(tuned, held_out))

        # The shared layers are in the module, and the client's own head replaces the initial one.
        fedper.load_state_dict(personal.federation_clients.own_state(client), strict=False)
        table["FedPer"].append(accuracy(fedper, held_out))

    print("\nAccuracy on each client's held-out samples, in percent\n")
    print(f"{'client':>6}{'samples':>9}{'held out':>10}" + "".join(f"{name:>12}" for name in table))
    for client in range(len(clients)):
        row = f"{client:>6}{len(clients.train_indices[client]):>9}{len(clients.held_out_indices[client]):>10}"
        print(row + "".join(f"{100 * values[client]:>12.1f}" for values in table.values()))
    means = [sum(values) / len(values) for values in table.values()]
    print(f"{'mean':>6}{'':>19}" + "".join(f"{100 * mean:>12.1f}" for mean in means))
    return table


if __name__ == "__main__":
    main()

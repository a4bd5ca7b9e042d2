"""FedHAW and FedAvg on real, unequal clients: scikit-learn's digits, split over ten clients by Dirichlet(0.1).

    python examples/digits.py

No download, under a minute on two cores. Prints the clients' label histograms, two progress bars that count rounds, a
table for each run and a comparison; writes `outputs/digits_clients.png` and `outputs/digits_weights.png`.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_fedhaw import (
    DirichletPartitioner,
    FedAvgCallback,
    FederatedDataModule,
    FederatedTrainer,
    FedHAWCallback,
)
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.plotting import RunHistory, draw_comparison


class DigitClassifier(pl.LightningModule):
    """An ordinary LightningModule, in which nothing depends on a federation."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.val_accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images)
        self.val_accuracy(logits, labels)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_acc", self.val_accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def digits(clients: int, alpha: float, seed: int) -> FederatedDataModule:
    """Split 1,437 training images of 8x8 pixels over the clients; 360 are for validation."""
    pixels, labels = load_digits(return_X_y=True)
    arrays = train_test_split(pixels / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    x_train, x_val, y_train, y_val = (torch.as_tensor(array) for array in arrays)
    return FederatedDataModule(
        TensorDataset(x_train.float(), y_train.long()),
        num_clients=clients,
        partitioner=DirichletPartitioner(alpha),
        batch_size=16,
        val=TensorDataset(x_val.float(), y_val.long()),
        seed=seed,
    )


def run(rule: AggregationRule, args: argparse.Namespace) -> RunHistory:
    """Run one federation: the same clients, cohorts, batches and initial model for every rule."""
    history = RunHistory()
    # The initial model; `seed=` below seeds the federation's own draws.
    torch.manual_seed(args.seed)
    trainer = FederatedTrainer(
        rounds=args.rounds,
        local_epochs=args.local_epochs,
        seed=args.seed,
        callbacks=[rule, history],
        accelerator=args.accelerator,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitClassifier(), digits(args.clients, args.alpha, args.seed))
    return history


def main(argv: list[str] | None = None) -> dict[str, RunHistory]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=0.1, help="Dirichlet concentration: small is unequal")
    parser.add_argument("--local-epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers", ".*LeafSpec.* is deprecated"):
        warnings.filterwarnings("ignore", message=message)

    args.output.mkdir(parents=True, exist_ok=True)
    data = digits(args.clients, args.alpha, args.seed)
    print(data.preview(args.output / "digits_clients.png"))

    histories: dict[str, RunHistory] = {}
    rows = []
    for name, rule in {"FedAvg": FedAvgCallback(), "FedHAW": FedHAWCallback(lr_lambda=0.3)}.items():
        print(f"\n{name}")
        histories[name] = run(rule, args)
        accuracy = histories[name].curve("val_acc")
        last_ten = accuracy[-10:]
        mean = sum(last_ten) / len(last_ten)
        rows.append(f"{name:8}{accuracy[-1]:>10.1%}{mean:>18.1%}{max(accuracy):>10.1%}")
    print(f"\n{'rule':8}{'final':>10}{'mean of last 10':>18}{'best':>10}")
    print("\n".join(rows))
    sizes = data.partition().sizes.tolist()
    draw_comparison(histories, "FedHAW", sizes, args.output / "digits_weights.png")
    print(f"\npictures: {args.output / 'digits_clients.png'}, {args.output / 'digits_weights.png'}")
    return histories


if __name__ == "__main__":
    main()

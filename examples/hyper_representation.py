"""Hyper-representation: a shared body is trained so that heads, which clients train on it, do well on held-out samples.

    python examples/hyper_representation.py [--data mnist.npz]

Ten clients with few classes each. The body is the upper variable, the head the lower one. AggITD, FedNest and SimFBO
are compared with FedAvg over communication rounds, which is as good here: it trains the body with the head. Default:
scikit-learn's digits, no download, under a minute on two cores. Prints a table; writes
`outputs/hyper_representation.png`.
"""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import torch
from short_runs import history_of, images, new_module, read_arguments
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedhaw import DirichletPartitioner, FedAvgCallback, FederatedDataModule
from lightning_fedhaw.bilevel import AggITDCallback, FedNestCallback, SimFBOCallback
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.plotting import RunHistory, draw_bands


class BodyAndHead(pl.LightningModule):
    """An ordinary module of two parts."""

    def __init__(self, pixels: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(pixels, 64), nn.Tanh())
        self.head = nn.Linear(64, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        decay = 0.01 / 2 * self.head.weight.square().sum()
        return cross_entropy(self.head(self.body(batch[0])), batch[1]) + decay

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.head(self.body(batch[0]))
        self.log("val_loss", cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main() -> None:
    """Compare four rules over equal numbers of communication rounds."""
    arguments = read_arguments(__doc__, rounds=120, has_data=True)
    train, test = images(arguments.data)
    pixels = train.tensors[0].shape[1]
    rules: dict[str, AggregationRule] = {
        "FedAvg": FedAvgCallback(),
        "AggITD": AggITDCallback("body", lower_rounds=3, upper_lr=0.5),
        "FedNest": FedNestCallback("body", lower_rounds=1, terms=3, upper_lr=0.5),
        "SimFBO": SimFBOCallback("body", lower_lr=0.5, vector_lr=0.5, radius=10.0, upper_lr=0.5),
    }
    runs: dict[str, list[RunHistory]] = {}
    print(f"{'rule':10}{'accuracy':>10}{'rounds an outer step':>24}")
    for name, rule in rules.items():
        module = new_module(partial(BodyAndHead, pixels))
        history = history_of(rule, module, clients(train, test), arguments.rounds, seed=1, client_val_fraction=0.25)
        runs[name] = [history]
        rounds = getattr(rule, "rounds_per_outer_step", "-")
        print(f"{name:10}{history.curve('val_acc')[-1]:>10.1%}{rounds:>24}")
    path = arguments.output / "hyper_representation.png"
    draw_bands(runs, ["val_acc", "val_loss"], path)
    print(f"picture: {path}")


def clients(train: TensorDataset, test: TensorDataset) -> FederatedDataModule:
    """Split the samples over ten clients with unequal classes."""
    return FederatedDataModule(
        train, num_clients=10, partitioner=DirichletPartitioner(0.3), batch_size=16, val=DataLoader(test, 512)
    )


if __name__ == "__main__":
    main()

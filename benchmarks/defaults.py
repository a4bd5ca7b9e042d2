"""The package's defaults on an ordinary project: FedHAWCallback() beside FedAvg, with the optimisers people use.

    python benchmarks/defaults.py --data mnist.npz [--rounds 30] [--seeds 0 1]

12,000 MNIST samples (train_x, train_y, test_x, test_y in the file), MLP 784-128-128-10, batch 64, in a stock Trainer
with one added line. Prints a markdown table: test accuracy, mean of the last five rounds, and the final scale.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedhaw import AggregationRule, FedAvgCallback, FedHAWCallback
from lightning_fedhaw.plotting import History

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]

PROJECTS: dict[str, tuple[MakeOptimizer, int]] = {
    "SGD 0.05, E=1": (lambda p: torch.optim.SGD(p, lr=0.05), 1),
    "Adam 1e-3, E=1": (lambda p: torch.optim.Adam(p, lr=1e-3), 1),
    "AdamW 1e-3, E=5": (lambda p: torch.optim.AdamW(p, lr=1e-3), 5),
}
RULES: dict[str, Callable[..., AggregationRule]] = {
    "FedAvg": FedAvgCallback,
    "FedHAW (default)": FedHAWCallback,
    "FedHAW (lr_gamma=0)": lambda **options: FedHAWCallback(lr_gamma=0.0, **options),
}


class MLP(pl.LightningModule):
    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.make_optimizer = make_optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def read(path: str) -> tuple[TensorDataset, TensorDataset]:
    """12,000 training samples, and the test set; pixels in [0, 1]."""
    with np.load(path) as file:
        x, y = torch.as_tensor(file["train_x"]), torch.as_tensor(file["train_y"])
        test = TensorDataset(torch.as_tensor(file["test_x"]).flatten(1) / 255, torch.as_tensor(file["test_y"]).long())
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:12_000]
    return TensorDataset(x[chosen].flatten(1) / 255, y[chosen].long()), test


def accuracy(
    rule: AggregationRule, make: MakeOptimizer, data: tuple[TensorDataset, TensorDataset], rounds: int
) -> float:
    history = History()
    trainer = pl.Trainer(
        max_epochs=rounds,
        callbacks=[rule, history],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    train, test = data
    trainer.fit(MLP(make), DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=2000))
    return float(np.mean(history.curve("val_acc")[-5:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    data = read(args.data)
    rows = ["| project | seed | " + " | ".join(RULES) + " |", "|---|---|" + "---|" * len(RULES)]
    for project, (make, epochs) in PROJECTS.items():
        for seed in args.seeds:
            cells = []
            for build in RULES.values():
                torch.manual_seed(seed)
                rule = build(local_epochs=epochs, seed=seed, client_eval=False)
                value = accuracy(rule, make, data, args.rounds)
                cells.append(f"{value:.2%}, scale {getattr(rule, 'scale', 1.0):.3f}")
            rows.append(f"| {project} | {seed} | " + " | ".join(cells) + " |")
    print("\n" + "\n".join(rows))


if __name__ == "__main__":
    main()

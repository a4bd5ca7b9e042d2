"""Memory of a cross-device federation, and the time to its first round.

    python benchmarks/memory.py [--rule fedavg|fedhaw] [--rounds 50]

1,000 clients of 60 samples, 100 a round, an MLP of 118,282 parameters. Prints the resident memory after rounds and the
seconds from `fit` to the first local step, as markdown.
"""

from __future__ import annotations

import argparse
import os
import time

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lightning_fedhaw import (
    FedAvgCallback,
    FederatedDataModule,
    FederatedTrainer,
    FedHAWCallback,
    IIDPartitioner,
    RoundObserver,
)


class MLP(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Meter(RoundObserver):
    """Resident memory in MB after every round, and when the first client was back."""

    def __init__(self) -> None:
        super().__init__()
        self.resident: list[float] = []
        self.first = 0.0

    def on_round_start(self, *_: object) -> None:
        self.first = self.first or time.perf_counter()

    def on_round_end(self, *_: object) -> None:
        with open("/proc/self/statm") as file:
            self.resident.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=("fedavg", "fedhaw"), default="fedhaw")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.rand(60_000, 784, generator=generator), torch.randint(10, (60_000,), generator=generator)
    )
    meter = Meter()
    trainer = FederatedTrainer(
        rounds=args.rounds,
        clients_per_round=100,
        callbacks=[FedAvgCallback() if args.rule == "fedavg" else FedHAWCallback(), meter],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        client_eval=False,
        accelerator="cpu",
    )
    begin = time.perf_counter()
    trainer.fit(MLP(), FederatedDataModule(data, 1000, IIDPartitioner(), batch_size=20))
    marks = [t for t in (1, 2, 3, 5, 10, 20, 30, 40, 50) if t <= args.rounds]
    print("\n| round | " + " | ".join(map(str, marks)) + " |")
    print("|---|" + "---|" * len(marks))
    print("| resident MB | " + " | ".join(f"{meter.resident[t - 1]:.0f}" for t in marks) + " |")
    print(f"\n{args.rule}: first round {meter.first - begin:.2f} s after `fit`, {args.rounds} rounds")


if __name__ == "__main__":
    main()

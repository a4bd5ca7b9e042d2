"""Compare the vectorized engine with the sequential one: the measurements behind the rule of ``engine="auto"``.

    python benchmarks/engines.py [--quick] > benchmarks/results/engines.md

Both engines train the same cohort in alternating runs, on the CPU with one thread. The table shows the fastest round
of each engine.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedhaw import FedAvgCallback, FederatedCallback, FederatedTrainer, IIDPartitioner

MODELS: dict[str, Any] = {
    "logistic 60-10": ((60,), lambda: nn.Linear(60, 10)),
    "MLP 60-64-10": ((60,), lambda: nn.Sequential(nn.Linear(60, 64), nn.ReLU(), nn.Linear(64, 10))),
    "MLP 784-32-10": ((784,), lambda: nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))),
    "MLP 784-128-128-10": (
        (784,),
        lambda: nn.Sequential(
            nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        ),
    ),
    "CNN 8-16 on 14x14": (
        (1, 14, 14),
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(256, 10),
        ),
    ),
}  # fmt: skip


class Model(pl.LightningModule):
    """A network with cross entropy and SGD."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = make()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(FederatedCallback):
    """Measure the seconds of every round."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_round_start(self, *_: object) -> None:
        self.begin = time.perf_counter()

    def on_round_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.begin)


def seconds(engine: str, name: str, clients: int, batch: int, rounds: int) -> float:
    """Return the seconds of the fastest round."""
    shape, make = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    count = clients * (4 * batch + batch // 2)
    data = TensorDataset(torch.randn(count, *shape, generator=generator), torch.randint(10, (count,)))
    clock = Clock()
    FederatedTrainer(
        rounds=rounds,
        num_clients=clients,
        partitioner=IIDPartitioner(),
        engine=engine,
        callbacks=[FedAvgCallback(), clock],
        accelerator="cpu",
        client_eval=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Model(make), DataLoader(data, batch_size=batch, shuffle=True))
    return min(clock.seconds)


def cells(quick: bool) -> Iterator[tuple[str, int, int]]:
    """Yield the model, number of clients and batch size of each row, without those that take too long."""
    limit = 2e5 if quick else 2e6
    for name in MODELS:
        for clients in (1, 3, 10, 100, 1000):
            for batch in (8, 32, 256):
                if clients * batch * cost(name) <= limit:
                    yield name, clients, batch


def cost(name: str) -> int:
    """Return the rough relative cost of a sample."""
    if name.startswith("log"):
        return 1
    if "784" not in name:
        return 10
    return 60


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small cells only")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Only the table goes to the standard output; the run summaries of the federations do not.
    out = sys.stdout
    sys.stdout = sys.stderr
    print(f"CPU, one thread, torch {torch.__version__}, {platform.machine()}. Seconds a round.\n", file=out)
    print("| model | parameters | clients | batch | sequential | vectorized | ratio |", file=out)
    print("|---|---|---|---|---|---|---|", file=out)
    for name, clients, batch in cells(quick):
        best = {"sequential": float("inf"), "vectorized": float("inf")}
        for _ in range(3):
            for engine in best:
                best[engine] = min(best[engine], seconds(engine, name, clients, batch, rounds=3))
        sequential = best["sequential"]
        vectorized = best["vectorized"]
        ratio = vectorized / sequential
        size = sum(p.numel() for p in MODELS[name][1]().parameters())
        print(
            f"| {name} | {size:,} | {clients} | {batch} | {sequential:.4f} | {vectorized:.4f} | {ratio:.2f} |",
            file=out,
            flush=True,
        )


if __name__ == "__main__":
    main()

"""The federation that the package and the formulas both play: five unequal clients and a tanh network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from federations import QUIET
from lightning_fedhaw import FederatedCallback, FederatedDataModule, FederatedTrainer, IndexPartitioner
from lightning_fedhaw.data import FixedSequenceSampler
from lightning_fedhaw.extending import AggregationRule
from parity.authors_formulas import CLASSES, FEATURES, HIDDEN

SIZES = (9, 41, 23, 14, 33)
ROUNDS, SEED = 8, 11
EVERYONE = [list(range(len(SIZES)))] * ROUNDS
SOME = [[0, 1, 2], [1, 2, 4], [0, 3, 4], [2], [0, 2, 3], [1, 4], [0, 1, 2, 3, 4], [3, 4]]


class Network(pl.LightningModule):
    def __init__(self, mu: float) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
        self.mu = mu

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.mu)


class Watcher(FederatedCallback):
    """Keeps the global model [P] and what the rule logged, after every round."""

    def __init__(self) -> None:
        self.rounds: list[tuple[np.ndarray, dict[str, float]]] = []

    def on_round_end(self, trainer: Any, pl_module: Any, report: Any) -> None:
        self.rounds.append((flat(pl_module).copy(), dict(report.metrics)))


def flat(module: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).double().numpy()


def samples() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Inputs, labels, and who owns which sample; clients see different classes."""
    draw = np.random.default_rng(2)
    total = sum(SIZES)
    owners = draw.permutation(np.repeat(np.arange(len(SIZES)), SIZES))
    y = (draw.integers(0, 2, total) + owners) % CLASSES
    x = draw.normal(size=(total, FEATURES)) + 1.5 * np.eye(FEATURES)[y]
    return x, y, [np.flatnonzero(owners == k) for k in range(len(SIZES))]


def proxy_samples() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of the server's own, twelve of each class."""
    draw = np.random.default_rng(4)
    y = np.tile(np.arange(CLASSES), 12)
    return draw.normal(size=(len(y), FEATURES)) + 1.5 * np.eye(FEATURES)[y], y


def from_trainer(
    rule: AggregationRule,
    cohorts: list[list[int]],
    *,
    mu: float,
    epochs: int,
    batch_size: int,
    precision: Any = "64-true",
    double: bool = False,
    beside: Sequence[Callback] = (),
) -> tuple[np.ndarray, Watcher]:
    """The initial model [P], and what the trainer makes of it."""
    dtype = torch.float64 if double or precision == "64-true" else torch.float32
    x, y, own = samples()
    train, proxy = (TensorDataset(torch.tensor(x, dtype=dtype), torch.tensor(y)) for x, y in ((x, y), proxy_samples()))
    data = FederatedDataModule(
        train,
        partitioner=IndexPartitioner([indices.tolist() for indices in own]),
        batch_size=batch_size,
        proxy=proxy,
    )
    module = Network(mu)
    if double:
        module.double()
    start, watcher = flat(module), Watcher()
    trainer = FederatedTrainer(
        rounds=ROUNDS,
        local_epochs=epochs,
        sampler=FixedSequenceSampler(cohorts),
        seed=SEED,
        callbacks=[rule, watcher, *beside],
        precision=precision,
        client_eval=False,
        **QUIET,
    )
    trainer.fit(module, datamodule=data)
    return start, watcher

"""The hypergradient of a problem that is not quadratic, against central differences of the solved lower problem."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from federations import QUIET, samples
from lightning_fedhaw import FederatedDataModule, FederatedTrainer
from lightning_fedhaw.bilevel import AggITDCallback, FedNestCallback

CLIENTS = 3
RATE = 0.8
RIDGE = 0.3


class Representation(pl.LightningModule):
    """A body that is the upper variable, and a head whose loss is strongly convex and not quadratic."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 3), nn.Tanh()).double()
            self.head = nn.Linear(3, 3).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ridge = RIDGE / 2 * (self.head.weight.square().sum() + self.head.bias.square().sum())
        return cross_entropy(self.head(self.body(batch[0])), batch[1]) + ridge

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", cross_entropy(self.head(self.body(batch[0])), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=RATE)


def sets(seed: int) -> list[TensorDataset]:
    """Samples of each client, of other numbers of samples for each."""
    whole = samples(36, seed=seed, dtype=torch.float64)
    parts = torch.split(torch.arange(36), [6, 12, 18])
    return [TensorDataset(*whole[part]) for part in parts]


TRAIN = sets(1)
HELD_OUT = sets(2)


def solve(module: Representation) -> None:
    """Minimize the mean of the clients' lower losses in the head by Newton's method, to rounding."""

    def loss(vector: Tensor) -> Tensor:
        losses = []
        for dataset in TRAIN:
            inputs, labels = dataset.tensors
            weight = vector[:9].reshape(3, 3)
            losses.append(cross_entropy(module.body(inputs) @ weight.T + vector[9:], labels))
        return torch.stack(losses).mean() + RIDGE / 2 * vector.square().sum()

    head = nn.utils.parameters_to_vector(module.head.parameters()).detach()
    for _ in range(8):
        gradient = torch.autograd.functional.jacobian(loss, head)
        head = head - torch.linalg.solve(torch.autograd.functional.hessian(loss, head), gradient)
    nn.utils.vector_to_parameters(head, module.head.parameters())


def upper_loss(change: Tensor, size: float) -> float:
    """Return the mean upper loss at the solution, with the first layer's weights changed."""
    module = Representation()
    with torch.no_grad():
        module.body[0].weight += size * change
    solve(module)
    losses = []
    with torch.no_grad():
        for dataset in HELD_OUT:
            inputs, labels = dataset.tensors
            losses.append(cross_entropy(module.head(module.body(inputs)), labels))
    return float(torch.stack(losses).mean())


def estimate(rule: Any) -> Tensor:
    """Return the hypergradient of the first layer's weights in one outer step from the solution."""
    module = Representation()
    solve(module)
    before = module.body[0].weight.detach().clone()
    trainer = FederatedTrainer(
        rounds=rule.rounds_per_outer_step,
        callbacks=[rule],
        local_steps=1,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        client_eval=False,
        **QUIET,
    )
    trainer.fit(module, FederatedDataModule(TRAIN, val=HELD_OUT, batch_size=18))
    return before - module.body[0].weight.detach()


@pytest.fixture(scope="module")
def slope() -> tuple[Tensor, float]:
    """A direction of the first layer's weights, and the central difference along it."""
    direction = torch.randn(3, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    size = 1e-5
    return direction, (upper_loss(direction, size) - upper_loss(direction, -size)) / (2 * size)


def test_the_error_of_aggitd_falls_with_its_rounds(slope: tuple[Tensor, float]) -> None:
    direction, expected = slope
    errors = []
    for rounds in (2, 8, 24, 72):
        found = estimate(AggITDCallback("body", lower_rounds=rounds, q="sum", upper_lr=1.0))
        errors.append(abs(float((found * direction).sum()) - expected) / abs(expected))
    # The smallest eigenvalue of the Hessian is the ridge: the error has the factor 0.76 a round.
    assert errors[1] < 0.4 * errors[0]
    assert errors[2] < 0.05 * errors[1]
    assert errors[3] < 1e-6


def test_fednest_finds_the_same(slope: tuple[Tensor, float]) -> None:
    direction, expected = slope
    found = estimate(FedNestCallback("body", terms=72, upper_lr=1.0))
    assert float((found * direction).sum()) == pytest.approx(expected, rel=1e-6)


def test_the_mean_of_own_hypergradients_is_another(slope: tuple[Tensor, float]) -> None:
    direction, expected = slope
    found = estimate(FedNestCallback("body", terms=72, variant="LFedNest", upper_lr=1.0))
    assert abs(float((found * direction).sum()) - expected) > 0.02 * abs(expected)

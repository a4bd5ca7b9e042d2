"""A whole federation against the formulas: the same numbers, through an ordinary LightningModule and the trainer.

``pytest tests/parity -rP`` prints the largest differences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET
from lightning_fedhaw import (
    FedAvgCallback,
    FederatedTrainer,
    FedHAWCallback,
    FedProx,
    IndexPartitioner,
    PublishedFedHAWCallback,
)
from lightning_fedhaw.extending import Channel
from lightning_fedhaw.streams import stream
from parity.authors_formulas import Formulas, Trace, local_sgd, play
from parity.federation import EVERYONE, ROUNDS, SEED, SIZES, SOME, Watcher, from_trainer, samples

EPOCHS, BATCH_SIZE = 2, 8
DIAGONAL = Formulas(mu=0.05, lr_gamma=2e-3, lr_lambda=2e-2)
EXACT = replace(DIAGONAL, exact=True, new_gamma=False)


def traces(watcher: Watcher, num_clients: int) -> list[Trace]:
    """Model, log-scale and logits after every round, as the package logs them."""
    return [
        Trace(w, seen.get("gamma", 0.0), np.array([seen.get(f"lambda/client_{k}", np.nan) for k in range(num_clients)]))
        for w, seen in watcher.rounds
    ]


def displacement(trace: Trace, start: np.ndarray) -> np.ndarray:
    """How far the model has come: nothing moved is nothing equal."""
    return trace.w - start


# ---------------------------------------------------------------------- eight rounds of minibatch SGD


def from_formulas(start: np.ndarray, cohorts: list[list[int]], formulas: Formulas) -> list[Trace]:
    x, y, own = samples()

    def train(w: np.ndarray, client: int, round_idx: int) -> np.ndarray:
        generator = stream(SEED, "client", client, "round", round_idx, "batches")
        orders = [own[client][torch.randperm(len(own[client]), generator=generator).numpy()] for _ in range(EPOCHS)]
        return local_sgd(w, x, y, orders, BATCH_SIZE, formulas.mu, formulas.proximal)

    return play(start, SIZES, cohorts, train, formulas)


def from_package(cohorts: list[list[int]], formulas: Formulas, **kwargs: Any) -> tuple[np.ndarray, list[Trace]]:
    """The initial model, and what the trainer makes of it."""
    rule = PublishedFedHAWCallback(
        lr_gamma=formulas.lr_gamma,
        lr_lambda=formulas.lr_lambda,
        jacobian="exact" if formulas.exact else "diagonal",
        gamma_for_lambda="new" if formulas.new_gamma else "old",
        pseudo_gradient="plain" if formulas.plain else "weighted",
    )
    kwargs["beside"] = [FedProx(formulas.proximal)] if formulas.proximal else []
    start, watcher = from_trainer(rule, cohorts, mu=formulas.mu, epochs=EPOCHS, batch_size=BATCH_SIZE, **kwargs)
    found = traces(watcher, len(SIZES))
    assert np.array_equal(found[-1].lam, rule.state["lambda_"].numpy())
    assert found[-1].gamma == rule.state["gamma"].item()
    return start, found


def largest_differences(cohorts: list[list[int]], formulas: Formulas, **kwargs: Any) -> dict[str, float]:
    """Over all rounds, after checking that everything has really moved."""
    start, ours = from_package(cohorts, formulas, **kwargs)
    theirs = from_formulas(start, cohorts, formulas)
    assert len(ours) == len(theirs) == ROUNDS
    assert np.abs(displacement(theirs[-1], start)).max() > 0.1
    assert abs(theirs[-1].gamma) > 1e-3
    assert np.abs(theirs[-1].lam - theirs[0].lam).max() > 1e-3
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "displacement": max(float(np.abs(displacement(a, start) - displacement(b, start)).max()) for a, b in pairs),
        "gamma": max(float(abs(a.gamma - b.gamma)) for a, b in pairs),
        "lambda": max(float(np.abs(a.lam - b.lam).max()) for a, b in pairs),
    }


CASES = {
    "diagonal, everyone": (EVERYONE, DIAGONAL),
    "exact, everyone": (EVERYONE, EXACT),
    "diagonal with the old gamma, everyone": (EVERYONE, replace(DIAGONAL, new_gamma=False)),
    "diagonal, plain, everyone": (EVERYONE, replace(DIAGONAL, plain=True)),
    "exact, plain, everyone": (EVERYONE, replace(EXACT, plain=True)),
    "diagonal, some": (SOME, DIAGONAL),
    "exact, some": (SOME, EXACT),
    "with FedProx, some": (SOME, replace(DIAGONAL, proximal=0.5)),
}


@pytest.mark.parametrize("name", CASES)
def test_eight_rounds_in_float64(name):
    found = largest_differences(*CASES[name])
    print(f"{name}, float64: {found}")
    assert max(found.values()) < 1e-11


def test_eight_rounds_with_a_module_in_double():
    found = largest_differences(EVERYONE, DIAGONAL, precision="32-true", double=True)
    print(f"diagonal, everyone, module.double(): {found}")
    assert max(found.values()) < 1e-11


@pytest.mark.parametrize("name", ["diagonal, everyone", "exact, everyone"])
def test_eight_rounds_in_float32(name):
    found = largest_differences(*CASES[name], precision="32-true")
    print(f"{name}, float32: {found}")
    assert max(found.values()) < 1e-5


def test_the_cases_differ():
    """What the cases tell apart is larger than what they may be off by."""
    start, _ = from_package(EVERYONE[:1] * ROUNDS, DIAGONAL)
    ends = [from_formulas(start, EVERYONE, f)[-1] for cohorts, f in CASES.values() if cohorts is EVERYONE]
    for i, a in enumerate(ends):
        for b in ends[:i]:
            assert np.abs(a.lam - b.lam).max() > 1e-6


# ---------------------------------------------------------------------- four rounds by hand: two quadratics


class Quadratic(pl.LightningModule):
    """``f_k(w) = |w - a_k|^2 / 2``; a client's samples are copies of ``a_k``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (points,) = batch
        return 0.5 * (self.w - points).square().sum(1).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SilentInRoundOne(Channel):
    """Client 0 is not received in round 1; its slot holds the model just broadcast."""

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        return torch.tensor([round_idx == 1 and client == 0 for client in clients])


def four_rounds(*callbacks: Any) -> list[Trace]:
    points = torch.tensor([[1.0, 0.0]] + 3 * [[0.0, 2.0]], dtype=torch.float64)
    watcher = Watcher()
    trainer = FederatedTrainer(
        rounds=4,
        local_epochs=1,
        partitioner=IndexPartitioner([[0], [1, 2, 3]]),
        callbacks=[*callbacks, watcher],
        client_eval=False,
        **QUIET,
    )
    trainer.fit(Quadratic(), DataLoader(TensorDataset(points), batch_size=len(points), shuffle=True))
    return traces(watcher, 2)


def check(trace: Trace, gamma: float | None, lam: tuple[float, float] | None, w: tuple[float, float]) -> None:
    np.testing.assert_allclose(trace.w, w, atol=6e-9, rtol=0)
    if gamma is not None:
        np.testing.assert_allclose(trace.gamma, gamma, atol=6e-9, rtol=0)
    if lam is not None:
        np.testing.assert_allclose(trace.lam, lam, atol=6e-9, rtol=0)


def rule(**kwargs: Any) -> FedHAWCallback:
    return PublishedFedHAWCallback(lr_gamma=0.01, lr_lambda=0.05, **kwargs)


def test_four_rounds_of_the_authors_rule():
    rounds = four_rounds(rule())
    check(rounds[0], 0.0, (-1.38629436, -0.28768207), (0.925, 1.05))
    check(rounds[1], -0.00151875, (-1.38881793, -0.28873356), (0.85617111, 1.09339333))
    check(rounds[2], -0.00225801, (-1.39050356, -0.28909420), (0.79370737, 1.13160076))
    check(rounds[3], -0.00239663, (-1.39153056, -0.28892569), (0.73749223, 1.16579294))


def test_four_rounds_of_the_exact_rule():
    rounds = four_rounds(rule(jacobian="exact"))
    check(rounds[3], -0.00238542, (-1.39029430, -0.28368214), (0.73735897, 1.16609811))


@pytest.mark.parametrize("fedavg", [FedAvgCallback(), PublishedFedHAWCallback(lr_gamma=0.0, lr_lambda=0.0)])
def test_four_rounds_of_fedavg(fedavg):
    check(four_rounds(fedavg)[3], None, None, (0.742075, 1.17195))


def test_four_rounds_with_a_client_that_is_not_heard_once():
    rounds = four_rounds(rule(), SilentInRoundOne())
    check(rounds[1], 0.00106406, None, (0.85650138, 1.12247919))
    check(rounds[2], 0.00011113, None, (0.79588623, 1.16046714))

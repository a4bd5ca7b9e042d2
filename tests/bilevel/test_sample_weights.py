"""Weights of samples, which stay with the clients: numbers worked by hand, several processes, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from federations import QUIET
from lightning_fedhaw import FederatedDataModule, FederatedTrainer
from lightning_fedhaw.bilevel import AggITDCallback, SampleWeights, with_indices

RATE = 0.5
TARGETS = [[1.0, 3.0], [2.0, -4.0, 5.0]]
HELD_OUT = [[0.5], [1.5]]


class Mean(pl.LightningModule):
    """One number, near the weighted mean of the samples; samples held out say which are worth something."""

    def __init__(self) -> None:
        super().__init__()
        self.y = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.weights = SampleWeights(5).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        targets, index = batch
        return (self.weights(index) * (self.y - targets) ** 2).mean() / 2

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", ((self.y - batch[0]) ** 2).mean() / 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.y], lr=RATE)


def sets(values: list[list[float]]) -> list[TensorDataset]:
    """One data set a client."""
    return [TensorDataset(torch.tensor(own, dtype=torch.float64)) for own in values]


def play(rule: Any, rounds: int, callbacks: Any = (), ckpt_path: Any = None, **options: Any) -> tuple[Any, Mean]:
    """Run some rounds of the two clients."""
    module = Mean()
    settings = {**QUIET, "client_eval": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, **options}
    trainer = FederatedTrainer(rounds=rounds, callbacks=[rule, *callbacks], **settings)
    data = FederatedDataModule(with_indices(sets(TARGETS)), batch_size=8, val=sets(HELD_OUT))
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module


def derivatives(y: float, z: float) -> list[Tensor]:
    """Each client's own hypergradient in the logits of its samples, by hand: half of ``y - t``, times ``-l z``."""
    return [-RATE * z * 0.5 * (y - torch.tensor(own, dtype=torch.float64)) / len(own) for own in TARGETS]


def one_round() -> tuple[float, float]:
    """Return y after the first round and the mean of the upper gradients before it, by hand.

    The clients' means are 2 and 1, and each client takes one step from 0 with the rate 0.5: to 1 and 0.5.
    """
    return (1 + 0.5) / 2, (-0.5 - 1.5) / 2


@pytest.mark.parametrize("processes", [1, 2])
def test_each_client_steps_its_own_logits_by_its_own_derivative(processes: int) -> None:
    place: dict[str, Any] = {}
    if processes > 1:
        place = {"devices": processes, "strategy": "federated_notebook"}
    _, module = play(AggITDCallback("weights", lower_rounds=1, upper_lr=1.0), 2, **place)
    assert module.y.item() == 0.75
    expected = -torch.cat(derivatives(*one_round()))
    torch.testing.assert_close(module.weights.logits.detach(), expected, rtol=0, atol=1e-15)


def test_each_client_bounds_its_own_derivative() -> None:
    own = derivatives(*one_round())
    norms = [float(derivative.norm()) for derivative in own]
    # Between the two, so that one client's is cut and the other's is not.
    clip = sum(norms) / 2
    assert norms[0] < clip < norms[1]
    # The vector itself has the length 1, and is not cut.
    rule = AggITDCallback("weights", lower_rounds=1, upper_lr=1.0, clip=clip)
    rule.checked_vector = lambda vector, first_norm: vector  # type: ignore[method-assign]
    _, module = play(rule, 2)
    expected = -torch.cat([own[0], own[1] * (clip / norms[1])])
    torch.testing.assert_close(module.weights.logits.detach(), expected, rtol=0, atol=1e-15)


def test_a_client_that_comes_later_begins_with_the_memory_of_a_beginner() -> None:
    # Rprop's first step has the length of the rate; its memory of it is not zero before.
    rule = AggITDCallback("weights", lower_rounds=1, upper_lr=0.1, upper_optimizer=torch.optim.Rprop)
    # With this seed the second and the fourth round draw different clients.
    _, module = play(rule, 4, clients_per_round=1, seed=12)
    # The first client reaches its first sample, whose derivative is zero.
    assert module.weights.logits.abs().tolist() == [0, *[pytest.approx(0.1)] * 4]


def test_a_run_goes_on_from_the_middle_of_an_outer_step(tmp_path: Path) -> None:
    def rule() -> AggITDCallback:
        return AggITDCallback("weights", lower_rounds=2, upper_lr=0.1, upper_optimizer=torch.optim.Adam)

    path = tmp_path / "middle.ckpt"

    class Save(pl.Callback):
        def on_round_end(self, trainer: Any, pl_module: Any, report: Any) -> None:
            if trainer.current_epoch == 4:
                trainer.save_checkpoint(path)

    _, straight = play(rule(), 9, [Save()], clients_per_round=1)
    _, resumed = play(rule(), 9, ckpt_path=path, clients_per_round=1)
    assert torch.equal(straight.weights.logits, resumed.weights.logits)
    assert torch.equal(straight.y, resumed.y)

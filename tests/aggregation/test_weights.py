"""Weights of one's own: as an argument, as a method of a subclass, and the same ones on every path."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET
from lightning_fedhaw import (
    ErasureChannel,
    FedAdamCallback,
    FedAdpCallback,
    FedAvgCallback,
    FedAvgMCallback,
    FederatedTrainer,
    FedHyperCallback,
    FedNovaCallback,
    FedOptCallback,
    FixedSequenceSampler,
    NaturalIdPartitioner,
    ScaffoldCallback,
    ServerFineTuningCallback,
)

# Whose turn it was is averaged on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Each client changed")

SHARES = [0.4, 0.3, 0.3]
OWNERS = torch.tensor([0] * 5 + [1] * 10 + [2] * 85)
PATHS = {
    "default": {},
    "device": {"storage": "device"},
    "host": {"storage": "host"},
    "sequential": {"engine": "sequential"},
    "vectorized": {"engine": "vectorized"},
}
PROCESSES = {
    "summed": {"devices": 2, "strategy": "federated_notebook"},
    "ordered": {"devices": 2, "strategy": "federated_notebook", "reduction": "ordered"},
    "host": {"devices": 2, "strategy": "federated_notebook", "storage": "host"},
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


class Owner(pl.LightningModule):
    """Its one step, of rate 1, ends at the unit vector of the client, so the mean of models is the weights."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def training_step(self, batch, batch_idx):
        loss = 0.5 * (self.w - torch.eye(3)[batch[0][0]]).square().sum()
        self.log("half", loss / 2)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


def fit(rule, rounds=1, **options):
    module = Owner()
    partitioner = NaturalIdPartitioner(OWNERS)
    options = {**QUIET, "client_eval": False, "partitioner": partitioner, "callbacks": [rule], **options}
    data = DataLoader(TensorDataset(OWNERS), batch_size=1000)
    FederatedTrainer(rounds=rounds, **options).fit(module, data)
    return module.w.detach()


def of(kind, **arguments):
    """A rule whose weights are those of a subclass."""

    class Mine(kind):
        def unnormalized_weight(self, update):
            return 2 * SHARES[update.client]

    return Mine(**arguments)


@every_path
@pytest.mark.parametrize(
    "weights",
    [SHARES, np.array([4.0, 3.0, 3.0]), {2: 0.3, 0: 0.4, 1: 0.3}, lambda update: SHARES[update.client]],
    ids=["list", "array", "mapping", "function"],
)
def test_the_argument(weights, path):
    torch.testing.assert_close(fit(FedAvgCallback(weights=weights), **path), torch.tensor(SHARES))


AVERAGES = {
    "FedAvg": lambda: of(FedAvgCallback),
    "FedAvg uniform": lambda: of(FedAvgCallback, weighting="uniform"),
    "SCAFFOLD": lambda: of(ScaffoldCallback),
    "FedHyper": lambda: of(FedHyperCallback),
    "fine-tuning": lambda: of(ServerFineTuningCallback, server_epochs=0),
    "FedOpt": lambda: of(FedOptCallback),
    "FedOpt on FedAvg": lambda: of(FedOptCallback, rule=FedAvgCallback()),
    "FedOpt on a subclass": lambda: FedOptCallback(rule=of(FedAvgCallback)),
    "FedOpt on weights": lambda: FedOptCallback(rule=FedAvgCallback(weights=SHARES)),
    "FedAvgM": lambda: of(FedAvgMCallback),
    "FedNova": lambda: of(FedNovaCallback, momentum=0.0),
    "FedNova proximal": lambda: of(FedNovaCallback, momentum=0.0, proximal=0.1),
    "FedOpt on FedNova": lambda: of(FedOptCallback, rule=FedNovaCallback(momentum=0.0)),
}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("place", PROCESSES.values(), ids=PROCESSES.keys())
def test_on_several_processes(place):
    torch.testing.assert_close(fit(of(FedAvgCallback), **place), torch.tensor(SHARES))


@pytest.mark.parametrize("path", [PATHS["default"], PATHS["host"]], ids=["default", "host"])
@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES.keys())
def test_the_method_of_a_subclass(make, path):
    """All clients make one step, so that FedNova averages too."""
    torch.testing.assert_close(fit(make(), **path), torch.tensor(SHARES))


def test_an_adaptive_rule():
    # The first step is lr (1 - beta1) delta / (sqrt(v) + tau), v = beta2 tau^2 + (1 - beta2) delta^2.
    delta = torch.tensor(SHARES)
    expected = 0.1 * 0.1 * delta / ((0.99 * 0.001**2 + 0.01 * delta**2).sqrt() + 0.001)
    rule = of(FedAdamCallback, lr=0.1, beta1=0.9, beta2=0.99, tau=0.001)
    torch.testing.assert_close(fit(rule), expected)


def test_in_a_stock_trainer():
    module = Owner()
    rule = FedAvgCallback(weights=SHARES, partitioner=NaturalIdPartitioner(OWNERS), client_eval=False)
    trainer = pl.Trainer(max_epochs=1, callbacks=[rule], **QUIET)
    trainer.fit(module, DataLoader(TensorDataset(OWNERS), batch_size=1000))
    torch.testing.assert_close(module.w.detach(), torch.tensor(SHARES))


def test_the_clients_that_take_part_share_the_weight():
    ends = fit(FedAvgCallback(weights=SHARES), sampler=FixedSequenceSampler([[0, 2]]))
    torch.testing.assert_close(ends, torch.tensor([4 / 7, 0.0, 3 / 7]))


def test_a_function_sees_the_update():
    seen = {}

    def weigh(update):
        seen[update.client] = (update.num_examples, update.num_steps, update.logged["half"].value)
        return 1.0

    fit(FedAvgCallback(weights=weigh))
    assert seen == {0: (5, 1, 0.25), 1: (10, 1, 0.25), 2: (85, 1, 0.25)}


def test_buffers_and_channels_go_by_the_same_weights():
    class Counts(Owner):
        def __init__(self):
            super().__init__()
            self.register_buffer("owner", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.owner.fill_(float(batch[0][0]))
            return super().training_step(batch, batch_idx)

    module = Counts()
    callbacks = [FedAvgCallback(weights=SHARES), ErasureChannel(0.0)]
    trainer = FederatedTrainer(
        rounds=1, partitioner=NaturalIdPartitioner(OWNERS), callbacks=callbacks, client_eval=False, **QUIET
    )
    trainer.fit(module, DataLoader(TensorDataset(OWNERS), batch_size=1000))
    assert module.owner.item() == pytest.approx(0.3 * 1 + 0.3 * 2)


def test_the_start_up_line_names_the_weights():
    assert FedAvgCallback(weights={1: 0.25, 0: 0.75}).describe() == "FedAvgCallback(weights=(0.75, 0.25))"
    assert FedAvgCallback(weights=[1.0] * 9).describe() == "FedAvgCallback(weights=of 9 clients)"
    assert FedAvgCallback(weights=float).describe() == "FedAvgCallback(weights=float)"
    assert FedAvgCallback().describe() == "FedAvgCallback(weighting=examples)"


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "weights", [[0.5, -0.1], [0.5, float("nan")], [0.0, 0.0], {0: float("inf")}, {}, [], "abc", 1, {1, 2}]
)
def test_numbers_that_are_no_weights(weights):
    with pytest.raises(ValueError, match="`weights` must be finite numbers of at least 0, one per client and not all"):
        FedAvgCallback(weights=weights)


def test_a_mapping_of_names():
    with pytest.raises(ValueError, match="`weights` must be a mapping from client numbers to numbers, got"):
        FedAvgCallback(weights={"hospital": 1.0})


def test_both_arguments():
    with pytest.raises(ValueError, match=r"`weights` replaces `weighting`, got both \(`weighting='uniform'`\)"):
        FedAvgCallback("uniform", weights=[1.0])


@pytest.mark.parametrize(
    ("weights", "problem"),
    [([0.5, 0.5], "2 and none for client 2"), ({0: 1.0, 2: 1.0}, "none for client 1"), ([1] * 5, "5 and one for cl")],
)
def test_another_number_of_clients(weights, problem):
    with pytest.raises(ValueError, match=f"one number for each of the 3 clients, 0 to 2, got .*{problem}"):
        fit(FedAvgCallback(weights=weights))


@pytest.mark.parametrize("storage", ["auto", "host"])
@pytest.mark.parametrize("weight", [-1.0, float("nan"), None], ids=str)
def test_a_method_that_returns_no_weight(weight, storage):
    class Mine(FedAvgCallback):
        def unnormalized_weight(self, update):
            return weight if update.client == 1 else 1.0

    with pytest.raises(ValueError, match="`Mine.unnormalized_weight of client 1` must be a finite number of at"):
        fit(Mine(), storage=storage)
    with pytest.raises(ValueError, match="`FedAvgCallback.unnormalized_weight of client 0` must be a finite number of"):
        fit(FedAvgCallback(weights=lambda update: weight))


@pytest.mark.parametrize("storage", ["auto", "host"])
def test_weights_that_are_all_zero_in_a_round(storage):
    with pytest.raises(
        ZeroDivisionError, match=r"Aggregation weights must have a positive sum, got \[0.0, 0.0\]"
    ) as caught:
        fit(FedAvgCallback(weights=[0, 0, 1]), storage=storage, sampler=FixedSequenceSampler([[0, 1]]))
    # Before Python 3.11 a note is a part of the message.
    assert "`weights` gives 0 to every client" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def test_a_method_that_would_be_ignored():
    with pytest.raises(ValueError, match=r"`Mine.unnormalized_weight` would be ignored: FedAdpCallback computes"):
        of(FedOptCallback, rule=FedAdpCallback())

"""The defaults on real data, and the arguments that stand in two places."""

import inspect
from dataclasses import fields

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET, Classifier, loader, samples
from lightning_fedhaw import (
    DirichletPartitioner,
    ErasureChannel,
    FedAdpCallback,
    FedAvgCallback,
    FedDynCallback,
    FederatedTrainer,
    FederationOptions,
    FedHAWCallback,
)
from lightning_fedhaw.keys import KeyedCallback
from lightning_fedhaw.objectives import FedDynObjective


class Digits(pl.LightningModule):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
        self.make = make

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return self.make(self.parameters())


@pytest.mark.parametrize(
    ("make", "epochs"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.05), 1),
        (lambda p: torch.optim.Adam(p, lr=1e-3), 1),
        (lambda p: torch.optim.AdamW(p, lr=1e-3), 5),
    ],
    ids=["sgd", "adam", "adamw, five epochs"],
)
def test_one_line_in_an_ordinary_project_stays_finite_and_within_two_points_of_fedavg(make, epochs):
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    train = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=16, shuffle=True)
    val = DataLoader(TensorDataset(x[1400:], y[1400:]), batch_size=400)
    accuracy = []
    for rule in (FedAvgCallback, FedHAWCallback):
        module = Digits(make)
        federated = rule(local_epochs=epochs, client_eval=False)
        runner = pl.Trainer(max_epochs=20 if epochs == 1 else 12, callbacks=[federated], **QUIET)
        runner.fit(module, train, val)
        assert all(torch.isfinite(p).all() for p in module.parameters())
        accuracy.append(float(runner.callback_metrics["val_acc"]))
    assert accuracy[1] >= accuracy[0] - 0.02


def classes_below(kind):
    for each in kind.__subclasses__():
        yield each
        yield from classes_below(each)


def test_no_rule_channel_or_objective_takes_the_name_of_an_option_for_itself():
    options = {option.name for option in fields(FederationOptions)}
    ours = [kind for kind in classes_below(KeyedCallback) if kind.__module__.startswith("lightning_fedhaw.")]
    assert {FedAvgCallback, FedDynCallback, ErasureChannel, FedDynObjective} <= set(ours)
    for kind in ours:
        assert not options & set(inspect.signature(kind).parameters), kind.__name__


@pytest.mark.parametrize("rule", [FedAvgCallback, FedDynCallback, FedAdpCallback])
def test_rules_that_are_compared_by_their_names_split_alike(rule):
    runner = pl.Trainer(max_epochs=1, callbacks=[rule(num_clients=5, alpha=1.0, client_eval=False)], **QUIET)
    runner.fit(Classifier(), loader())
    partition = DirichletPartitioner(1.0).partition(5, num_samples=120, labels=samples().tensors[1])
    assert runner.fit_loop.federation.data.partition.fingerprint() == partition.fingerprint()


def test_the_trainer_takes_every_option_with_the_same_default():
    taken = inspect.signature(FederatedTrainer).parameters
    for option in fields(FederationOptions):
        assert taken[option.name].default == option.default, option.name

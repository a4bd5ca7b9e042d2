"""Synthetic(alpha, beta): its sizes, what differs between clients, and a federation of them."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from federations import QUIET, Classifier
from lightning_fedhaw import FedAvgCallback, FederatedTrainer
from lightning_fedhaw.data import Synthetic


def test_sizes_have_the_heavy_tail_of_the_paper():
    sizes = torch.tensor(Synthetic(num_clients=200).sizes, dtype=torch.float64)
    assert sizes.min() >= 50
    # exp(m) with m ~ N(4, 2) has the median 54.6, and 21 % are above 273.
    assert sizes.median() == pytest.approx(50 + 54.6, rel=0.3)
    assert float((sizes > 50 + 273).double().mean()) == pytest.approx(0.21, abs=0.08)
    assert max(Synthetic(num_clients=200, max_samples=300).sizes) == 300


def test_a_client_depends_on_its_number_and_the_seed_alone():
    few = Synthetic(num_clients=3, max_samples=60)
    many = Synthetic(num_clients=5, max_samples=60)
    other = Synthetic(num_clients=3, max_samples=60, seed=1)
    assert torch.equal(few.clients[2][0], many.clients[2][0])
    assert not torch.equal(few.clients[2][0], other.clients[2][0])


def test_the_deviations_of_inputs_fall_and_means_differ_between_clients():
    inputs, _ = max(Synthetic(num_clients=20).clients, key=lambda client: len(client[0]))
    deviations = inputs.std(0)
    assert deviations[0] == pytest.approx(1.0, rel=0.1)
    assert deviations[-1] == pytest.approx(60**-0.6, rel=0.1)
    # Without alpha and beta, only v differs from zero in the mean; in the IID form it is the same for all features.
    same = Synthetic(0.0, 0.0, num_clients=4, iid=True)
    assert all(x.mean(0)[10:].abs().max() < 0.2 for x, _ in same.clients)


def test_iid_clients_share_their_task():
    data = Synthetic(iid=True, num_clients=10)
    x, y = data.train.tensors
    net = nn.Linear(60, 10)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=60)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float((net(x).argmax(1) == y).float().mean()) > 0.95


def test_a_federation_of_it_with_a_test_set_for_each_client():
    data = Synthetic(num_clients=6, max_samples=60, test_fraction=0.25)
    module = Classifier(classes=10)
    module.net = nn.Linear(60, 10)
    runner = FederatedTrainer(rounds=1, callbacks=[FedAvgCallback()], **QUIET)
    runner.fit(module, data.datamodule(10))
    sizes = torch.tensor(data.sizes)
    assert [len(samples) for samples in data.test] == [round(0.25 * size) for size in data.sizes]
    assert runner.fit_loop.federation.data.num_examples.tolist() == (sizes - (0.25 * sizes).round().long()).tolist()
    assert runner.federation_summary["clients_measured_on"] == "held-out data"

"""FedLWS: shrinking layer by layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from federations import Classifier, flat, train
from lightning_fedhaw import FedAvgCallback, FedLWSCallback
from lightning_fedhaw.extending import ClientVectors, Cohort, ParameterLayout
from lightning_fedhaw.server import Server


class Two(nn.Module):
    """A layer of two parameters and one of a single parameter."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        self.b = nn.Linear(1, 1, bias=False, dtype=torch.float64)


MODULE = Two()
SERVER = Server(MODULE, ParameterLayout.of(MODULE))
START = torch.tensor([3.0, 4.0, 1.0], dtype=torch.float64)
MODELS = torch.tensor([[3.2, 4.1, 1.5], [2.6, 3.9, 0.9]], dtype=torch.float64)


def step(rule, start=START, models=MODELS, server=SERVER):
    many = len(models)
    cohort = Cohort(
        round=0,
        clients=torch.arange(many),
        num_examples=torch.tensor([10, 30][:many]),
        num_steps=torch.ones(many, dtype=torch.int64),
        received=torch.ones(many, dtype=torch.bool),
        start=start,
        vectors=ClientVectors(models - start, start),
    )
    return rule.step(cohort, {}, server)


def test_one_round_without_bounds():
    end = step(FedLWSCallback(beta=0.1, tau_min=0.0, tau_max=math.inf))
    assert end.parameters.tolist() == pytest.approx([2.74557290, 3.94364107, 1.04842736], abs=1e-8)
    assert end.weights.tolist() == [0.25, 0.75]
    assert end.metrics["shrink/min"] == pytest.approx(0.99839014, abs=1e-8)
    assert end.metrics["shrink/mean"] == pytest.approx((0.99839014 + 0.99850225) / 2, abs=1e-8)


def test_one_round_with_the_default_bounds():
    end = step(FedLWSCallback())
    assert end.parameters.tolist() == pytest.approx([2.74859848, 3.94798691, 1.04947526], abs=1e-8)
    assert end.metrics["shrink/min"] == pytest.approx(0.99949036, abs=1e-8)


def test_one_client_shrinks_by_the_least_ratio():
    assert step(FedLWSCallback(), models=MODELS[:1]).metrics["shrink/min"] < 1
    alone = step(FedLWSCallback(tau_min=0.0, tau_max=math.inf), models=MODELS[:1])
    assert torch.equal(alone.parameters, START + (MODELS[0] - START))


def test_a_layer_that_is_zero_may_grow():
    start = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    assert step(FedLWSCallback(), start=start).parameters[2].item() == pytest.approx(0.25 * 1.5 + 0.75 * 0.9)


def test_weight_and_bias_are_one_layer_and_zero_biases_are_none_of_their_own():
    layout = ParameterLayout.of(Classifier(norm=True))
    assert [len(parts) for parts in layout.groups().values()] == [2, 2, 2]


def test_buffers_are_averaged_and_not_shrunk():
    rule = FedLWSCallback(beta=0.0, tau_min=1.0, tau_max=1.0)
    (_, plain), (_, shrunk) = train(Classifier(norm=True), rounds=1), train(Classifier(norm=True), rounds=1, rule=rule)
    assert torch.equal(plain.net[1].running_mean, shrunk.net[1].running_mean)
    assert torch.equal(plain.net[1].running_var, shrunk.net[1].running_var)
    assert shrunk.net[0].weight.norm() < 0.99 * plain.net[0].weight.norm()


def test_a_federation_shrinks():
    rule = FedLWSCallback(beta=0.1)
    (_, plain), (_, shrunk) = train(rule=FedAvgCallback(), rounds=5), train(rule=rule, rounds=5)
    assert flat(shrunk).norm() < flat(plain).norm()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="`beta` must be a finite number of at least 0, got -1"):
        FedLWSCallback(beta=-1)
    with pytest.raises(
        ValueError, match="`tau_max` must be a number of at least 0.3, got 0.2. It may not be less than `tau_min`"
    ):
        FedLWSCallback(tau_min=0.3)

"""FedAdp: the angles, their means, the map and the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_fedhaw import FedAdpCallback
from lightning_fedhaw.aggregation.fedadp import angles, gompertz
from lightning_fedhaw.extending import ClientVectors, Cohort, ParameterLayout
from lightning_fedhaw.server import Server

EXAMPLES = torch.tensor([10, 10, 20])
FIRST = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.2]], dtype=torch.float64)
SECOND = torch.tensor([[1.0, 0.2], [0.3, 1.0], [-0.5, 0.5]], dtype=torch.float64)
MODULE = nn.Linear(1, 1).double()
SERVER = Server(MODULE, ParameterLayout.of(MODULE))


def cohort(round_idx, displacements, clients=(0, 1, 2), received=None):
    start = torch.tensor([3.0, -1.0], dtype=torch.float64)
    clients = torch.tensor(clients)
    return Cohort(
        round=round_idx,
        clients=clients,
        num_examples=EXAMPLES[clients],
        num_steps=torch.ones(len(clients), dtype=torch.int64),
        received=torch.ones(len(clients), dtype=torch.bool) if received is None else torch.tensor(received),
        start=start,
        vectors=ClientVectors(displacements, start),
    )


def test_two_rounds_as_published():
    """The numbers were worked out with NumPy; a common factor of the updates changes nothing."""
    rule = FedAdpCallback()
    state = rule.init(torch.zeros(2), EXAMPLES)
    one = rule.step(cohort(0, -0.1 * FIRST), state, SERVER)
    assert one.state["angles"].tolist() == pytest.approx([2.19104581, 0.62024949, 0.75315128], abs=1e-8)
    assert one.weights.tolist() == pytest.approx([0.00252512, 0.36761997, 0.62985491], abs=1e-8)
    expected = torch.tensor([3.0, -1.0]).double() - 0.1 * one.weights @ FIRST
    assert torch.allclose(one.parameters, expected)
    two = rule.step(cohort(1, -0.1 * SECOND), one.state, SERVER)
    assert two.state["angles"].tolist() == pytest.approx([1.71445943, 0.38808928, 0.83703858], abs=1e-8)
    assert two.weights.tolist() == pytest.approx([0.00352743, 0.45580565, 0.54066692], abs=1e-8)
    assert two.state["counts"].tolist() == [2, 2, 2]


def test_the_map():
    at = torch.tensor([0.0, math.pi / 2, math.pi, 2.19104581, 0.62024949, 0.75315128], dtype=torch.float64)
    expected = [5.0, 0.27993086, 0.00011183, 0.01294446, 4.99370577, 4.83899837]
    assert gompertz(at, 5.0).tolist() == pytest.approx(expected, abs=1e-7)


def test_an_update_of_nothing_is_a_right_angle_and_equal_updates_are_none():
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    still = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    assert angles(ClientVectors(still), third)[1].item() == pytest.approx(math.pi / 2)
    assert angles(ClientVectors(torch.zeros(3, 2)), third).tolist() == pytest.approx([math.pi / 2] * 3)
    equal = angles(ClientVectors(torch.rand(1, 50).expand(3, 50).clone()), third)
    assert equal.tolist() == pytest.approx([0.0] * 3, abs=1e-3)
    tiny = angles(ClientVectors(1e-9 * FIRST), EXAMPLES / 40)
    assert tiny.tolist() == pytest.approx([2.19104581, 0.62024949, 0.75315128], abs=1e-7)


def test_each_client_has_its_own_count():
    rule = FedAdpCallback()
    state = rule.init(torch.zeros(2), EXAMPLES)
    state = rule.step(cohort(0, FIRST[:2], (0, 1)), state, SERVER).state
    before = state["angles"].clone()
    state = rule.step(cohort(1, SECOND[1:], (1, 2)), state, SERVER).state
    now = angles(ClientVectors(SECOND[1:]), torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    assert state["counts"].tolist() == [1, 2, 1]
    assert state["angles"][0] == before[0]
    assert state["angles"][1].item() == pytest.approx((before[1] + now[0]).item() / 2)
    assert state["angles"][2].item() == pytest.approx(now[1].item())


def test_a_client_that_was_not_received_keeps_its_angle_or_gets_a_right_one():
    silent = FIRST.clone()
    silent[1] = 0
    # Its update is in the cohort, as a substitute of zeros, only if the rule asks for substitutes.
    assert not FedAdpCallback().takes_substitutes
    rule = FedAdpCallback(smooth_substitutes=True)
    assert rule.takes_substitutes
    state = rule.init(torch.zeros(2), EXAMPLES)
    step = rule.step(cohort(0, silent, received=[True, False, True]), state, SERVER)
    assert step.state["counts"].tolist() == [1, 1, 1]
    assert step.state["angles"][1].item() == pytest.approx(math.pi / 2)
    assert 0 < step.weights[1] < 0.25


def test_the_number_of_the_round_may_stand_in_the_mean():
    rule = FedAdpCallback(smooth_by="rounds")
    state = rule.init(torch.zeros(2), EXAMPLES)
    late = rule.step(cohort(3, FIRST), state, SERVER).state["angles"]
    assert late.tolist() == pytest.approx([2.19104581 / 4, 0.62024949 / 4, 0.75315128 / 4], abs=1e-8)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="`gompertz` must be a finite number of at least 0, got -1"):
        FedAdpCallback(gompertz=-1)
    with pytest.raises(ValueError, match="`smooth_by` must be one of 'participations', 'rounds', got 'ever'"):
        FedAdpCallback(smooth_by="ever")

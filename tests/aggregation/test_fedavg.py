"""FedAvg: the average, its weights, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_fedhaw import FedAvgCallback
from lightning_fedhaw.extending import ClientUpdate, ClientVectors, Cohort, ParameterLayout
from lightning_fedhaw.server import Server
from lightning_fedhaw.vectors.accumulated import AccumulatedVectors

START = torch.tensor([1.0, -2.0], dtype=torch.float64)
DISPLACEMENTS = torch.tensor([[0.2, -0.4], [-0.1, 0.5]], dtype=torch.float64)
EXAMPLES = torch.tensor([1, 3])


def make_server() -> Server:
    module = nn.Linear(1, 1).double()
    return Server(module, ParameterLayout.of(module))


def make_cohort(displacements=DISPLACEMENTS, examples=EXAMPLES, vectors=None) -> Cohort:
    many = len(displacements)
    return Cohort(
        round=0,
        clients=torch.arange(many),
        num_examples=examples,
        num_steps=torch.ones(many, dtype=torch.int64),
        received=torch.ones(many, dtype=torch.bool),
        start=START,
        vectors=vectors or ClientVectors(displacements, START),
    )


def test_weighs_by_examples():
    step = FedAvgCallback().step(make_cohort(), {}, make_server())
    # The mean displacement is (0.25 * 0.2 - 0.75 * 0.1, -0.25 * 0.4 + 0.75 * 0.5) = (-0.025, 0.275).
    torch.testing.assert_close(step.parameters, torch.tensor([0.975, -1.725], dtype=torch.float64))
    assert step.weights.tolist() == [0.25, 0.75]
    assert step.weights.dtype == torch.float64
    assert step.state == {}


def test_weighs_uniformly():
    step = FedAvgCallback(weighting="uniform").step(make_cohort(), {}, make_server())
    torch.testing.assert_close(step.parameters, torch.tensor([1.05, -1.95], dtype=torch.float64))
    assert step.weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_running_sum_gives_the_same(weighting):
    rule = FedAvgCallback(weighting=weighting)
    raw = torch.tensor(
        [
            rule.unnormalized_weight(ClientUpdate(k, n, num_steps=1, num_skipped=0, displacement=DISPLACEMENTS[k]))
            for k, n in enumerate(EXAMPLES.tolist())
        ],
        dtype=torch.float64,
    )
    summed = make_cohort(vectors=AccumulatedVectors(raw @ DISPLACEMENTS, raw, START, "FedAvgCallback"))
    ours = rule.step(summed, {}, make_server())
    theirs = rule.step(make_cohort(), {}, make_server())
    torch.testing.assert_close(ours.parameters, theirs.parameters)
    assert torch.equal(ours.weights, theirs.weights)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_one_client_alone_is_the_model(weighting):
    step = FedAvgCallback(weighting=weighting).step(make_cohort(DISPLACEMENTS[:1], EXAMPLES[:1]), {}, make_server())
    torch.testing.assert_close(step.parameters, START + DISPLACEMENTS[0])


def test_clients_that_stay_leave_the_model_alone_to_the_last_bit():
    step = FedAvgCallback().step(make_cohort(torch.zeros(2, 2, dtype=torch.float64)), {}, make_server())
    assert torch.equal(step.parameters, START)


def test_inputs_are_untouched_and_state_passes_through():
    displacements, start = DISPLACEMENTS.clone(), START.clone()
    cohort = make_cohort()
    step = FedAvgCallback().step(cohort, {"kept": 1}, make_server())
    assert torch.equal(DISPLACEMENTS, displacements)
    assert torch.equal(START, start)
    assert step.state == {"kept": 1}


def test_a_client_without_examples_has_no_weight():
    step = FedAvgCallback().step(make_cohort(examples=torch.tensor([0, 3])), {}, make_server())
    torch.testing.assert_close(step.parameters, START + DISPLACEMENTS[1])


def test_refuses_a_zero_sum():
    with pytest.raises(ZeroDivisionError, match="positive sum"):
        FedAvgCallback().step(make_cohort(examples=torch.tensor([0, 0])), {}, make_server())


def test_refuses_an_unknown_weighting():
    with pytest.raises(ValueError, match="`weighting` must be one of 'examples', 'batches', 'uniform', got 'loss'"):
        FedAvgCallback(weighting="loss")

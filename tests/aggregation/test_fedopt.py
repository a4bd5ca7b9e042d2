"""FedOpt: the published numbers, optimizers of torch on the server, schedules, and rules that wrap rules."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, MultiStepLR, OneCycleLR

from federations import Classifier, flat, loader, train, trainer
from lightning_fedhaw import (
    FedAdagradCallback,
    FedAdamCallback,
    FedAdpCallback,
    FedAvgCallback,
    FedAvgMCallback,
    FedHAWCallback,
    FedNovaCallback,
    FedOptCallback,
    FedYogiCallback,
)
from lightning_fedhaw.extending import ClientVectors, Cohort, ParameterLayout
from lightning_fedhaw.server import Server

START = torch.tensor([1.0, -2.0], dtype=torch.float64)
DISPLACEMENTS = torch.tensor([[0.2, -0.4], [-0.1, 0.5]], dtype=torch.float64)


def play(rule, rounds=2):
    """The parameters after each round, with the same displacements in every round."""
    module = nn.Linear(1, 1).double()
    server, start, models = Server(module, ParameterLayout.of(module)), START, []
    state = rule.init(start, torch.tensor([1, 3]))
    for t in range(rounds):
        cohort = Cohort(
            round=t,
            clients=torch.arange(2),
            num_examples=torch.tensor([1, 3]),
            num_steps=torch.tensor([1, 1]),
            received=torch.ones(2, dtype=torch.bool),
            start=start,
            vectors=ClientVectors(DISPLACEMENTS, start),
            learning_rates=(0.1, 0.1),
        )
        step = rule.step(cohort, state, server)
        start, state = step.parameters, step.state
        models.append(start.tolist())
    return models


# Worked out with NumPy from the published equations; displacement (-0.025, 0.275) in both rounds.
NUMBERS = {
    "FedAvgM": (lambda: FedAvgMCallback(1.0, 0.9), (0.975, -1.725), (0.9275, -1.2025)),
    "FedAdagrad": (lambda: FedAdagradCallback(0.1), (0.90392003, -1.90036298), (0.83518108, -1.82983388)),
    "FedAdagrad from 0": (
        lambda: FedAdagradCallback(0.1, initial_second_moment=0.0),
        (0.90384615, -1.90036232),
        (0.83508046, -1.82983299),
    ),
    "FedAdam": (lambda: FedAdamCallback(0.1), (0.93226263, -1.90356966), (0.83039697, -1.77230854)),
    "FedAdam from 0": (
        lambda: FedAdamCallback(0.1, initial_second_moment=0.0),
        (0.92857143, -1.90350877),
        (0.82363810, -1.77220600),
    ),
    "FedYogi": (lambda: FedYogiCallback(0.1), (0.93229670, -1.90357027), (0.83067579, -1.77263012)),
    "FedYogi from 0": (
        lambda: FedYogiCallback(0.1, initial_second_moment=0.0),
        (0.92857143, -1.90350877),
        (0.82384285, -1.77252643),
    ),
}


@pytest.mark.parametrize(("make", "first", "second"), NUMBERS.values(), ids=NUMBERS.keys())
def test_two_rounds_as_published(make, first, second):
    models = play(make())
    assert models[0] == pytest.approx(first, abs=1e-8)
    assert models[1] == pytest.approx(second, abs=1e-8)


def test_adagrad_of_torch_is_fedadagrad():
    ours = FedAdagradCallback(0.1, tau=0.01)
    theirs = FedOptCallback(partial(torch.optim.Adagrad, eps=0.01, initial_accumulator_value=0.01**2), lr=0.1)
    assert play(ours, 5)[-1] == pytest.approx(play(theirs, 5)[-1], abs=1e-12)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD"])
def test_any_optimizer_of_torch_steps_on_minus_the_displacement(optimizer):
    make = getattr(torch.optim, optimizer)
    expected = START.clone().requires_grad_()
    theirs = make([expected], lr=0.1)
    expected.grad = -torch.tensor([0.25, 0.75], dtype=torch.float64) @ DISPLACEMENTS
    for _ in range(4):
        theirs.step()
    assert play(FedOptCallback(make, lr=0.1), 4)[-1] == pytest.approx(expected.tolist(), abs=1e-8)
    assert (expected - START).abs().min() > 1e-3


@pytest.mark.parametrize(
    "schedule",
    [partial(MultiStepLR, milestones=[2, 3], gamma=0.1), partial(LinearLR, start_factor=0.5, total_iters=3)],
    ids=["MultiStepLR", "LinearLR"],
)
def test_a_schedule_steps_once_a_round(schedule):
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs, rates = schedule(reference), []
    for _ in range(5):
        rates.append(reference.param_groups[0]["lr"])
        reference.step()
        theirs.step()
    assert len(set(rates)) > 2
    models = torch.tensor([START.tolist(), *play(FedOptCallback(lr=0.5, lr_scheduler=schedule), 5)])
    delta = (torch.tensor([0.25, 0.75]).double() @ DISPLACEMENTS).float()
    assert torch.allclose(models.diff(dim=0), torch.tensor(rates)[:, None] * delta, atol=1e-6)


def test_parameters_come_in_their_own_shapes():
    seen = []

    class Looks(torch.optim.SGD):
        def __init__(self, parameters, lr):
            seen.append([tuple(p.shape) for p in parameters])
            super().__init__(parameters, lr=lr)

        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    rule = FedOptCallback(Looks)
    seen.clear()  # it has been tried
    train(rule=rule, rounds=1)
    assert seen == [[(8, 6), (8,), (3, 8), (3,)]]


def test_a_rule_on_a_rule_steps_along_its_proposal_and_takes_its_weights():
    module = nn.Linear(1, 1).double()
    server = Server(module, ParameterLayout.of(module))
    inner, outer = FedAdpCallback(), FedOptCallback(rule=FedAdpCallback(), lr=0.5)
    cohort = Cohort(
        round=0,
        clients=torch.arange(2),
        num_examples=torch.tensor([1, 3]),
        num_steps=torch.ones(2, dtype=torch.int64),
        received=torch.ones(2, dtype=torch.bool),
        start=START,
        vectors=ClientVectors(DISPLACEMENTS, START),
    )
    proposed = inner.step(cohort, inner.init(START, cohort.num_examples), server)
    step = outer.step(cohort, outer.init(START, cohort.num_examples), server)
    assert torch.allclose(step.parameters, (START + proposed.parameters) / 2)
    assert torch.equal(step.weights, proposed.weights)
    assert torch.equal(step.state["rule"]["angles"], proposed.state["angles"])
    assert step.metrics == {**proposed.metrics, "server_lr": 0.5}


def test_what_the_inner_rule_needs_and_says_goes_through():
    runner, _ = train(rule=FedOptCallback(torch.optim.Adam, lr=0.01, rule=FedHAWCallback(lr_gamma=0.01)), rounds=3)
    assert runner.federation_summary["scale"] == pytest.approx(float(runner.callback_metrics["scale"]), rel=1e-6)
    assert float(runner.callback_metrics["scale"]) != 1
    assert float(runner.callback_metrics["server_lr"]) == pytest.approx(0.01)
    rule = runner.callbacks[0]
    assert "rule=FedHAWCallback(lr_gamma=0.01" in rule.describe()
    assert "Adam" in rule.describe()

    nova = FedOptCallback(rule=FedNovaCallback())
    train(Classifier(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8)), rule=nova, rounds=1)
    assert nova.rule.momentum == 0.8


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    "make",
    [
        lambda: FedYogiCallback(lr_scheduler=partial(MultiStepLR, milestones=[2, 4])),
        lambda: FedAvgMCallback(rule=FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1), lr=0.5),
        lambda: FedOptCallback(
            partial(torch.optim.AdamW, amsgrad=True), lr_scheduler=partial(OneCycleLR, max_lr=0.1, total_steps=10)
        ),
    ],
    ids=["scheduled Yogi", "momentum on FedHAW", "one cycle"],
)
def test_a_run_goes_on_bit_by_bit(make, tmp_path):
    straight = train(rule=make(), rounds=5)[1]
    first = trainer(rounds=3, rule=make())
    first.fit(Classifier(), loader())
    first.save_checkpoint(tmp_path / "three.ckpt")
    assert torch.load(tmp_path / "three.ckpt", weights_only=True)["callbacks"]
    module, second = Classifier(), trainer(rounds=5, rule=make())
    second.fit(module, loader(), ckpt_path=tmp_path / "three.ckpt")
    assert torch.equal(flat(module), flat(straight))


def test_memory_does_not_grow_with_the_cohort_where_the_proposal_needs_no_vectors():
    for rule in (FedOptCallback(), FedAdamCallback(), FedAvgMCallback(rule=FedAvgCallback("uniform"))):
        assert rule.unnormalized_weight is not None
    assert FedAvgMCallback(rule=FedAdpCallback()).unnormalized_weight is None


def test_ready_made_things_are_refused():
    ready = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(TypeError, match=r"`optimizer` must make .*`partial\(torch.optim.SGD, .*got a ready-made SGD"):
        FedOptCallback(ready)
    with pytest.raises(TypeError, match="`lr_scheduler` must make .* got a ready-made MultiStepLR"):
        FedOptCallback(lr_scheduler=MultiStepLR(ready, [1]))
    with pytest.raises(TypeError, match="`optimizer` must make .* got 'adam'"):
        FedOptCallback("adam")
    with pytest.raises(
        TypeError, match="`rule` must be an instance of `AggregationRule`, .* got the class FedAvgCallback"
    ):
        FedOptCallback(rule=FedAvgCallback)
    with pytest.raises(ValueError, match=r"`rule` \(FedAvgCallback\) was given arguments .* Give them to FedAdamCall"):
        FedAdamCallback(rule=FedAvgCallback(local_epochs=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedOptCallback(lr=-1.0), "`lr` must be a finite number of at least 0, got -1.0"),
        (lambda: FedAvgMCallback(momentum=1.0), r"`momentum` must be a number in \[0, 1\), got 1.0"),
        (lambda: FedAdamCallback(tau=0.0), "`tau` must be a finite number above 0, got 0.0"),
        (lambda: FedAdamCallback(beta2=1.5), r"`beta2` must be a number in \[0, 1\), got 1.5"),
        (lambda: FedYogiCallback(initial_second_moment=-1.0), "`initial_second_moment` must be .* got -1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.filterwarnings("ignore:Client . returned non-finite")
def test_a_diverging_run_is_told_of_the_servers_rate():
    class Spoilt(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.raises(FloatingPointError, match=r"The server's learning rate is 0.3: a lower `lr`"):
        train(Spoilt(), rule=FedOptCallback(lr=0.3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inner", [FedAvgCallback, FedHAWCallback, FedAdpCallback])
def test_displacements_in_another_dtype_than_the_models(dtype, inner):
    (_, exact), (_, module) = (
        train(rounds=2, rule=FedOptCallback(rule=inner()), storage="device", storage_dtype=each)
        for each in (None, dtype)
    )
    assert module.net[0].weight.dtype == torch.float32
    assert torch.allclose(flat(module), flat(exact), atol=1e-2)

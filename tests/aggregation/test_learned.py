"""What rules learn by a probe: the derivatives, the steps, and that nothing shows when a run is stopped or divided."""

from dataclasses import replace
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from federations import QUIET, Classifier, flat, loader, train, trainer, val_loader
from lightning_fedhaw import (
    FedAdagradCallback,
    FedAdamCallback,
    FedAvgCallback,
    FedAvgMCallback,
    FederatedTrainer,
    FedOptCallback,
    FedYogiCallback,
    LearnedClientRateCallback,
    LearnedWeightingCallback,
    Probe,
    PublishedFedHAWCallback,
)
from lightning_fedhaw import autodiff as ad
from lightning_fedhaw.aggregation.fedhaw_published import gamma_hypergradient, lambda_hypergradient
from lightning_fedhaw.aggregation.learned import LINKS
from lightning_fedhaw.extending import ClientVectors, Cohort, ProbeResult


class Flat:
    """A server whose model is one parameter."""

    class layout:
        views = staticmethod(lambda vector: {"weight": vector})


def cohort_of(start, models, num_examples, round_idx=0):
    models = torch.as_tensor(models, dtype=start.dtype)
    count = len(models)
    return Cohort(
        round=round_idx,
        clients=torch.arange(count),
        num_examples=torch.tensor(num_examples),
        num_steps=torch.ones(count, dtype=torch.int64),
        received=torch.ones(count, dtype=torch.bool),
        start=start,
        vectors=ClientVectors(models - start, start),
        learning_rates=(0.5,),
    )


def answer(model, gradient, round_idx=0):
    nobody = torch.empty(0, dtype=torch.int64)
    return ProbeResult(round_idx, model, 0.0, gradient, nobody, nobody.double())


# ---------------------------------------------------------------------- numbers worked by hand

TRAINED_TO = torch.tensor([[0.0, 0.0], [2.0, -1.0]], dtype=torch.float64)
PROBED = torch.tensor([[0.0, 0.5], [1.0, -0.5]], dtype=torch.float64)
ONES = torch.ones(2, dtype=torch.float64)


def half_way(start):
    """One local step of rate 0.5 on half the squared distance, by clients with 1 and 3 examples."""
    return cohort_of(start, start - 0.5 * (start - TRAINED_TO), [1, 3])


def slope(model):
    """The mean gradient of half the squared distance from the points of the probe."""
    return model - PROBED.mean(0)


def test_rate_and_momentum_take_the_steps_of_the_paper():
    rule = FedAvgMCallback(lr=1.0, momentum=0.9, learn=("lr", "momentum"))
    state = rule.init(ONES, torch.tensor([1, 3]))
    assert rule.learn_from(answer(ONES, slope(ONES)), state, Flat) == (state, {}), "nothing before the first step"
    # A velocity of (0.2, -0.1) from before.
    start = rule.step(half_way(ONES), state, Flat)
    velocity = {"state": {0: {"momentum_buffer": torch.tensor([0.2, -0.1], dtype=torch.float64)}}}
    state = {**start.state, "optimizer": {**start.state["optimizer"], **velocity}}
    step = rule.step(half_way(ONES), state, Flat)
    assert step.parameters.tolist() == pytest.approx([1.07, 0.215])
    state, metrics = rule.learn_from(answer(step.parameters, slope(step.parameters)), step.state, Flat)
    assert metrics["hypergradient/lr"] == pytest.approx(-0.128875)
    assert metrics["hypergradient/momentum"] == pytest.approx(-0.0925)
    assert rule.learned.values(state["learned"]) == pytest.approx({"lr": 1.00128875, "momentum": 0.900925})
    assert rule.learn_from(answer(ONES, ONES), state, Flat) == (state, {}), "a derivative is used once"
    # The next round of the parallel form takes the new numbers.
    second = rule.step(half_way(step.parameters), state, Flat)
    assert second.parameters.tolist() == pytest.approx([1.34842311, -0.97625938], abs=1e-8)
    assert second.metrics["server_lr"] == second.metrics["learned/lr"] == pytest.approx(1.00128875)


def test_the_exponent_takes_the_step_of_the_paper():
    # The displacement is Delta, so the next model is (1, 1) + Delta of the mean; the check numbers are those of Delta.
    for link, factor in (("identity", 1.0), ("softplus", 1 - 1 / torch.e)):
        rule = LearnedWeightingCallback(1.0, link=link, hyper_optimizer=torch.optim.SGD)
        step = rule.step(half_way(ONES), rule.init(ONES, torch.tensor([1, 3])), Flat)
        assert step.weights.tolist() == pytest.approx([0.25, 0.75])
        assert step.state["tangents"]["exponent"].tolist() == pytest.approx([0.2059898, -0.1029949], abs=1e-7)
        gradient = torch.tensor([0.57, 0.215], dtype=torch.float64)
        state, metrics = rule.learn_from(answer(step.parameters, gradient), step.state, Flat)
        assert metrics["hypergradient/exponent"] == pytest.approx(0.09527029, abs=1e-8)
        raw = state["learned"]["raw"]["exponent"] - step.state["learned"]["raw"]["exponent"]
        assert float(raw) == pytest.approx(-0.01 * 0.09527029 * factor, abs=1e-9)


@pytest.mark.parametrize("name", LINKS)
def test_links_are_undone_by_their_inverses_and_have_their_slopes(name):
    link = LINKS[name]
    raw = torch.tensor([-3.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    assert torch.allclose(link.inverse(link.value(raw)), raw)
    exact = torch.autograd.functional.jacobian(link.value, raw).diagonal()
    assert torch.allclose(link.slope(raw), exact)


# ---------------------------------------------------------------------- derivatives of every rule's last step

MEANS = {
    "FedAvgM": lambda: FedAvgMCallback(learn=("lr", "momentum")),
    "logarithm": lambda: FedAvgMCallback(learn=("lr", "momentum"), links={"lr": "exp", "momentum": "sigmoid"}),
    "Nesterov": lambda: FedOptCallback(
        partial(torch.optim.SGD, momentum=0.5, nesterov=True, weight_decay=0.01),
        learn=("lr", "momentum", "weight_decay"),
    ),
    "Adam": lambda: FedOptCallback(torch.optim.Adam, lr=0.1, learn=("lr", "beta1", "beta2")),
    "AdamW": lambda: FedOptCallback(torch.optim.AdamW, lr=0.1, learn=("lr", "beta1", "weight_decay")),
    "RMSprop": lambda: FedOptCallback(torch.optim.RMSprop, lr=0.1, learn=("lr", "alpha")),
    "Adagrad": lambda: FedOptCallback(torch.optim.Adagrad, lr=0.1, learn=("lr",)),
    "NAdam": lambda: FedOptCallback(torch.optim.NAdam, lr=0.1, learn=("lr", "beta1")),
    "FedAdam": lambda: FedAdamCallback(learn=("lr", "beta1", "beta2", "tau")),
    "FedYogi": lambda: FedYogiCallback(learn=("lr", "beta1", "beta2")),
    "FedAdagrad": lambda: FedAdagradCallback(beta1=0.3, learn=("lr", "beta1")),
    "on a rule": lambda: FedAvgMCallback(learn=("lr",), rule=FedAvgCallback("uniform")),
    "exponent": lambda: LearnedWeightingCallback(0.7),
    "exponent by sigmoid": lambda: LearnedWeightingCallback(0.7, link="sigmoid"),
}


@pytest.mark.parametrize("make", MEANS.values(), ids=MEANS.keys())
def test_the_derivative_is_that_of_the_last_step(make):
    rule = make()
    generator = torch.Generator().manual_seed(0)
    start = torch.linspace(-1, 1, 5, dtype=torch.float64)
    state = rule.init(start, torch.tensor([10, 20, 40]))
    for t in range(3):
        models = start + torch.randn(3, 5, generator=generator, dtype=torch.float64)
        # An element that no client moves: a second moment of zero.
        models[:, 2] = start[2]
        given = cohort_of(start, models, [10, 20, 40], t)
        before = state
        step = rule.step(given, state, Flat)
        start = step.parameters
        state = step.state
    for name in rule.learned.starts:
        raw = before["learned"]["raw"]
        ends = []
        for shift in (1e-7, -1e-7):
            moved = {**before["learned"], "raw": {**raw, name: raw[name] + shift}}
            ends.append(rule.step(given, {**before, "learned": moved}, Flat).parameters)
        expected = (ends[0] - ends[1]) / 2e-7
        link = LINKS[rule.learned.links[name]]
        found = state["tangents"][name] * link.slope(raw[name])
        assert torch.isfinite(found).all()
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6), name


def test_the_loss_of_a_federation_falls_as_its_hypergradient_says():
    """The logged hypergradient against two runs whose rate differs in the last round."""
    losses = {}
    for lr in (0.7, 0.7 + 1e-3, 0.7 - 1e-3):
        rule = FedAvgMCallback(
            lr=lr, momentum=0.5, learn=("lr",), hyper_lr=0.0, probe=Probe("cohort", form="sequential")
        )
        runner, _ = train(Classifier().double(), loader(), rule=rule, rounds=1, precision="64-true")
        losses[lr] = (float(runner.callback_metrics["probe_loss"]), float(runner.callback_metrics["hypergradient/lr"]))
    ends = [loss for loss, _ in losses.values()]
    assert losses[0.7][1] == pytest.approx((ends[1] - ends[2]) / 2e-3, rel=1e-3)


# ---------------------------------------------------------------------- steps


def one_number(**kwargs):
    rule = FedOptCallback(lr=1.0, learn=("lr",), hyper_lr=1.0, **kwargs)
    step = rule.step(half_way(ONES), rule.init(ONES, torch.tensor([1, 3])), Flat)
    # The step is along (0.25, -0.875), so a gradient of (1, 0) has the hypergradient 0.25.
    return rule, step


def learned_by(gradient, **kwargs):
    rule, step = one_number(**kwargs)
    gradient = torch.tensor(gradient, dtype=torch.float64)
    state, metrics = rule.learn_from(answer(step.parameters, gradient), step.state, Flat)
    return rule.learned.values(state["learned"])["lr"], metrics


def test_bounds_links_and_optimizers_of_a_step():
    assert learned_by([1.0, 0.0])[0] == pytest.approx(0.75)
    assert learned_by([1.0, 0.0], bounds={"lr": (0.9, 2.0)})[0] == pytest.approx(0.9)
    assert learned_by([1.0, 0.0], links={"lr": "exp"})[0] == pytest.approx(torch.tensor(-0.25).exp().item())
    assert learned_by([9.0, 0.0])[0] == 0.0, "no optimizer is defined below"
    assert learned_by([9.0, 0.0], hyper_optimizer=torch.optim.Adam)[0] == pytest.approx(0.0, abs=1e-6)


def test_a_gradient_that_is_not_finite_is_refused_and_counted():
    with pytest.warns(UserWarning, match="The hypergradient step of round 0 would make lr not finite, and was refused"):
        value, metrics = learned_by([float("inf"), 0.0])
    assert value == 1.0
    assert metrics == {"hypergradient/lr": 0.0, "hyper_steps_refused": 1.0}


def test_a_rate_that_is_too_small_grows():
    plain = FedAvgMCallback(lr=0.05, momentum=0.5)
    learning = FedAvgMCallback(lr=0.05, momentum=0.5, learn=("lr", "momentum"), hyper_lr=0.5)
    ends = []
    for rule in (plain, learning):
        runner, _ = train(rule=rule, rounds=10, val=val_loader())
        ends.append(float(runner.callback_metrics["val_loss"]))
    assert ends[1] < 0.9 * ends[0]
    summary = runner.federation_summary
    assert summary["learned_lr"] > 0.2
    assert {"learned_lr", "learned_momentum"} <= set(summary["learned"])
    assert learning.learned.values(learning.state["learned"])["lr"] == summary["learned_lr"]


# ---------------------------------------------------------------------- FedHAW is a pullback


def test_the_exact_hypergradients_of_fedhaw_are_the_pullback_of_the_aggregation():
    generator = torch.Generator().manual_seed(1)
    models = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(6, generator=generator, dtype=torch.float64)
    gamma = torch.tensor(0.3, dtype=torch.float64)
    logits = torch.randn(4, generator=generator, dtype=torch.float64)
    clients = ad.Clients(range(4))
    placed = ad.place(list(models), clients)

    def along(hyper):
        model = hyper["gamma"].exp() * ad.weighted_sum(placed, torch.softmax(hyper["lambda"], 0))
        return model @ cotangent

    found = ad.value_and_grad(along, wrt="hyper", mode="reverse")({"gamma": gamma, "lambda": logits})
    shares = torch.softmax(logits, 0)
    model = gamma.exp() * shares @ models
    # With the factor of the weighted pseudo-gradient, and so as published.
    plain = gamma_hypergradient(cotangent @ model, gamma, "plain")
    assert float(found.gradient["gamma"]) == pytest.approx(float(plain), rel=1e-14)
    exact = lambda_hypergradient(models @ cotangent, shares, gamma, "exact", "plain")
    assert torch.allclose(found.gradient["lambda"], exact, rtol=1e-13, atol=1e-15)


def test_fedhaw_with_a_probe_steps_along_the_true_gradient():
    rule = PublishedFedHAWCallback(0.1, 0.2, jacobian="exact", probe=Probe())
    state = rule.init(ONES, torch.tensor([1, 3]))
    step = rule.step(half_way(ONES), state, Flat)
    gradient = torch.tensor([0.57, 0.215], dtype=torch.float64)
    state, _ = rule.learn_from(answer(step.parameters, gradient), step.state, Flat)
    gamma = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logits = step.state["lambda_"].clone().requires_grad_()
    models = step.state["previous"].matrix + step.state["previous"].start
    (gamma.exp() * torch.softmax(logits, 0) @ models @ gradient).backward()
    assert float(state["gamma"]) == pytest.approx(-0.1 * float(gamma.grad))
    assert torch.allclose(state["lambda_"], logits.detach() - 0.2 * logits.grad)
    assert rule.learn_from(answer(step.parameters, gradient), state, Flat) == (state, {}), "once for each model"
    second = rule.step(replace(half_way(step.parameters), round=1), state, Flat)
    assert torch.equal(second.state["gamma"], state["gamma"]), "nothing is learned from the pseudo-gradient"
    assert not rule.needs_learning_rates


# ---------------------------------------------------------------------- runs

adam = {"hyper_optimizer": torch.optim.Adam, "hyper_lr": 0.05}
RUNS = {
    "FedAvgM": lambda **kw: FedAvgMCallback(learn=("lr", "momentum"), **adam, **kw),
    "exponent": lambda **kw: LearnedWeightingCallback(probe=Probe("cohort", form="sequential"), **adam, **kw),
    "FedHAW": lambda **kw: PublishedFedHAWCallback(0.01, 0.1, probe=Probe(), **kw),
    "client rate": lambda **kw: LearnedClientRateCallback(**kw),
}
every_run = pytest.mark.parametrize("make", RUNS.values(), ids=RUNS.keys())


def fit(rule, rounds=4, stock=False, ckpt_path=None, **kwargs):
    saved = ModelCheckpoint(dirpath="kept", save_top_k=-1, filename="{epoch}")
    options = {**QUIET, "enable_checkpointing": True, "callbacks": [rule, saved], **kwargs}
    if stock:
        runner = pl.Trainer(max_epochs=rounds, **options)
    else:
        runner = FederatedTrainer(rounds=rounds, num_clients=4, alpha=10.0, clients_per_round=3, **options)
    module = Classifier(norm=True, dropout=0.2)
    runner.fit(module, loader(drop_last=True), ckpt_path=ckpt_path)
    return runner, module


def assert_same(mine, theirs):
    assert torch.equal(flat(mine[1]), flat(theirs[1]))
    for name, value in mine[0].callback_metrics.items():
        assert torch.equal(value, theirs[0].callback_metrics[name]), name


@every_run
def test_stopping_and_the_stock_trainer_give_the_same_bits(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = fit(make())
    assert_same(whole, fit(make(num_clients=4, alpha=10.0, clients_per_round=3), stock=True))
    assert_same(whole, fit(make(), ckpt_path="kept/epoch=1.ckpt"))


@every_run
def test_both_engines_learn_the_same(make):
    ends = []
    for engine in ("sequential", "vectorized"):
        module = Classifier().double()
        runner = trainer(rule=make(), rounds=3, engine=engine, precision="64-true")
        runner.fit(module, loader())
        ends.append(flat(module))
    assert torch.allclose(*ends, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", ["FedAvgM", "FedHAW", "client rate"])
def test_two_processes_give_the_bits_of_one(name):
    make = RUNS[name]
    runs = []
    for place in ({}, {"devices": 2, "strategy": "federated_notebook"}):
        runner = trainer(rule=make(), num_clients=5, clients_per_round=3, reduction="ordered", rounds=3, **place)
        module = Classifier(norm=True, dropout=0.2)
        runner.fit(module, loader(drop_last=True))
        runs.append((runner, module))
    assert_same(*runs)


def test_the_memory_of_another_optimizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(RUNS["FedAvgM"](), rounds=1)
    with pytest.raises(ValueError, match=r"hyper_optimizer=Adam.*hyper_optimizer=SGD"):
        fit(FedAvgMCallback(learn=("lr", "momentum")), ckpt_path="kept/epoch=0.ckpt")
    # Rates and bounds may change.
    again = FedAvgMCallback(learn=("lr", "momentum"), hyper_optimizer=torch.optim.Adam, bounds={"lr": (0.5, 2.0)})
    fit(again, rounds=2, ckpt_path="kept/epoch=0.ckpt")


# ---------------------------------------------------------------------- what is refused

WRONG = [
    ({"learn": "lr"}, "`learn` must be names of hyper-parameters"),
    ({"learn": 3}, "`learn` must be names of hyper-parameters"),
    ({"learn": ("lr", "lr")}, "`learn` names 'lr' twice"),
    ({"learn": ("rate",)}, "`learn` names 'rate', and that hyper-parameter of SGD does not exist. It can be lr"),
    ({"learn": ("momentum",)}, "hyper-parameter of SGD is 0, which is no real number"),
    ({"learn": ("nesterov",)}, "hyper-parameter of SGD is False, which is no real number"),
    ({"learn": ("lr",), "optimizer": torch.optim.Rprop}, "the step of Rprop does not depend on it"),
    ({"learn": ("momentum",), "optimizer": torch.optim.Muon}, "derivative of Muon's step in it differs from a central"),
    ({"probe": Probe()}, "`probe` is for what is learned, and `learn` is empty"),
    ({"learn": ("lr",), "probe": 3}, "`probe` must be"),
    ({"learn": ("lr",), "hyper_lr": -1.0}, "`hyper_lr` must be"),
    ({"learn": ("lr",), "bounds": {"lr": (2.0, 3.0)}}, "`lr` is learned within the bounds 2 to 3, and starts at 1"),
    ({"learn": ("lr",), "bounds": {"lr": (2.0, 1.0)}}, "`bounds` must be a smallest and a larger number for each name"),
    ({"learn": ("lr",), "bounds": {"momentum": (0, 1)}}, "`bounds` names 'momentum', and what is learned is lr"),
    ({"learn": ("lr",), "links": {"lr": "log"}}, "`links` must be one of"),
    (
        {"learn": ("lr",), "links": {"lr": "sigmoid"}},
        "`lr` starts at 1, and the values of the link 'sigmoid'",
    ),
    (
        {"learn": ("lr",), "lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=2)},
        '`learn` names "lr", which `lr_scheduler` sets',
    ),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_what_cannot_be_learned_is_refused(wrong, said):
    with pytest.raises((ValueError, TypeError), match=said):
        FedOptCallback(**wrong)


def test_a_rule_that_learns_nothing_is_described_as_before():
    assert FedAvgMCallback().describe() == "FedAvgMCallback(lr=1, momentum=0.9)"
    assert FedAvgMCallback().resume_key == "FedAvgMCallback(lr=1, momentum=0.9)"
    learning = FedAvgMCallback(learn=("lr",))
    assert (
        learning.describe()
        == "FedAvgMCallback(lr=1, momentum=0.9, learn=(lr), probe=Probe('training', form='parallel'))"
    )

"""A learned client rate: its derivative through whole rounds against differences, and that nothing else changes."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from federations import Classifier, flat, samples, train, trainer
from lightning_fedhaw import (
    DifferentialPrivacyChannel,
    ErasureChannel,
    FedAvgCallback,
    FedProx,
    LearnedClientRateCallback,
    Probe,
)
from lightning_fedhaw.aggregation.shared_rate import SharedRate

SGD = torch.optim.SGD
OPTIMIZERS = {
    "SGD": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, dampening=0.1),
    "Nesterov with decay": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": partial(torch.optim.Adam, lr=0.05),
    "AMSGrad": partial(torch.optim.Adam, lr=0.05, amsgrad=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    "NAdam": partial(torch.optim.NAdam, lr=0.05),
    "RAdam": partial(torch.optim.RAdam, lr=0.05),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.1),
    "Adadelta": partial(torch.optim.Adadelta, lr=1.0),
    "Adamax": partial(torch.optim.Adamax, lr=0.05),
}


class Quadratic(pl.LightningModule):
    """Half a squared distance from points, stretched; the last weight has no part in it."""

    def __init__(self, make):
        super().__init__()
        self.point = nn.Parameter(torch.tensor([1.0, -0.5, 0.3]))
        self.make = make

    def training_step(self, batch, batch_idx):
        stretched = torch.tensor([1.0, 3.0]) * (self.point[:2] - batch[0])
        return stretched.square().sum(1).mean() / 2

    def configure_optimizers(self):
        return self.make(self.parameters())


class Smooth(Classifier):
    """A network with smooth activations, batch statistics and masks."""

    def __init__(self, make, **kwargs):
        super().__init__(make, **kwargs)
        self.net[-3] = nn.Tanh()


class Gated(nn.Module):
    """The last output of a GRU over each sample as three steps of two inputs."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(2, 4, batch_first=True)

    def forward(self, inputs):
        return self.cell(inputs.reshape(len(inputs), 3, 2))[0][:, -1]


def attention(dropout):
    """A layer of a transformer over each sample as three tokens of two inputs."""
    layer = nn.TransformerEncoderLayer(4, 2, 4, dropout, nn.functional.softplus, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 4), layer, nn.Flatten())


BODIES = {
    "GRU": (Gated, 4),
    "transformer": (partial(attention, 0.0), 12),
    "transformer with dropout": (partial(attention, 0.2), 12),
}


class Sequences(Classifier):
    """Classifies samples that are sequences."""

    def __init__(self, name, make):
        super().__init__(make)
        body, width = BODIES[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(body(), nn.Linear(width, 3))


class Kept(LearnedClientRateCallback):
    """Takes given factors, one a round, and keeps each round's model and its derivative in the round's factor."""

    def __init__(self, factors):
        super().__init__(probe=Probe("cohort", form="sequential"))
        self.factors = factors
        self.ends = []

    def local_lr_scale(self, state, layout):
        return SharedRate(self.factors[len(self.ends)])

    def step(self, cohort, state, server):
        output = super().step(cohort, state, server)
        self.ends.append((output.parameters, output.state["tangents"]["factor"]))
        return output


def points():
    inputs = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs), batch_size=4, shuffle=True)


def classes():
    return DataLoader(samples(40), batch_size=8, shuffle=True)


def fit(make_module, data, factors, callbacks=(), **kwargs):
    """A few rounds of three clients in double precision."""
    options = {"local_steps": 4, "num_clients": 3, "alpha": None, "precision": "64-true", **kwargs}
    rule = Kept(factors)
    trainer(rounds=len(factors), rule=rule, callbacks=callbacks, **options).fit(make_module().double(), data())
    return rule.ends


def assert_derivative(make_module, data, rounds=1, **kwargs):
    """The derivative of each round's model in the round's factor is the central difference."""
    width = 1e-6
    factors = [1.3, 0.8][:rounds]
    ends = fit(make_module, data, factors, **kwargs)
    for t in range(rounds):
        sides = []
        for change in (width, -width):
            changed = [*factors[:t], factors[t] + change]
            sides.append(fit(make_module, data, changed, **kwargs)[t][0])
        difference = (sides[0] - sides[1]) / (2 * width)
        assert float(difference.norm()) > 1e-3
        assert torch.allclose(ends[t][1], difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_the_derivative_is_the_difference(make, engine):
    assert_derivative(partial(Quadratic, make), points, engine=engine)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_derivative_on_a_quadratic(steps):
    assert_derivative(partial(Quadratic, OPTIMIZERS["SGD"]), points, rounds=2, local_steps=steps, engine="sequential")


@pytest.mark.parametrize(("steps", "engine"), [(1, "sequential"), (4, "vectorized")])
def test_the_derivative_through_a_network(steps, engine):
    make = partial(Smooth, OPTIMIZERS["Nesterov with decay"], norm=True, dropout=0.3)
    assert_derivative(make, classes, rounds=2, engine=engine, local_steps=steps, client_lr_scale=[0.5, 1.0, 2.0])


@pytest.mark.parametrize(
    ("name", "optimizer", "engine"),
    [
        ("GRU", "SGD", "sequential"),
        ("GRU", "Adam", "vectorized"),
        ("transformer", "SGD", "vectorized"),
        ("transformer", "Adam", "sequential"),
        ("transformer with dropout", "SGD", "sequential"),
        ("transformer with dropout", "Adam", "vectorized"),
    ],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_the_derivative_through_sequence_models(name, optimizer, engine):
    make_optimizer = OPTIMIZERS[optimizer]
    if optimizer == "Adam":
        # The bias of attention's keys has no gradient but rounding, and Adam's usual `eps` would make steps of it.
        make_optimizer = partial(make_optimizer, eps=1e-3)
    make = partial(Sequences, name, make_optimizer)
    assert_derivative(make, classes, engine=engine, local_steps=2)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_the_derivative_through_a_term_and_clipping(engine):
    make = partial(Smooth, OPTIMIZERS["momentum"])
    kwargs = {"engine": engine, "gradient_clip_val": 0.3}
    assert_derivative(make, classes, callbacks=[FedProx(0.5)], **kwargs)


def test_the_factor_takes_the_step_that_is_worked_by_hand():
    """One client, half a squared distance of 1: w = 1 - 0.5 b, dw/db = -0.5, and G = w - 0 at the new model."""

    class Line(Quadratic):
        def training_step(self, batch, batch_idx):
            return self.point[0].square() / 2

    data = DataLoader(TensorDataset(torch.zeros(2, 2)), batch_size=2)
    rule = LearnedClientRateCallback(
        1.2, link="identity", hyper_optimizer=SGD, hyper_lr=0.4, probe=Probe("cohort", form="sequential")
    )
    runner, module = train(Line(partial(SGD, lr=0.5)), data, rule=rule, rounds=1, num_clients=1, alpha=None)
    assert float(module.point[0].detach()) == pytest.approx(1 - 0.6)
    assert float(runner.callback_metrics["hypergradient/factor"]) == pytest.approx(0.4 * -0.5)
    assert rule.summary() == pytest.approx({"learned_factor": 1.2 + 0.4 * 0.2})
    # Down two models and a factor; up an update, a tangent, and the answer to the probe with its loss.
    assert runner.federation_summary["bytes_down"] == 2 * 3 * 4 + 4
    assert runner.federation_summary["bytes_up"] == 3 * 3 * 4 + 4


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_a_factor_of_one_that_is_not_stepped_is_fedavg(engine):
    ends = []
    for rule in (LearnedClientRateCallback(hyper_lr=0.0), FedAvgCallback()):
        module = Classifier(OPTIMIZERS["Adam"], dropout=0.2)
        train(module, rule=rule, rounds=2, engine=engine)
        ends.append(flat(module))
    assert torch.equal(*ends) or torch.allclose(*ends, rtol=1e-6)


def test_a_rate_that_is_too_small_grows():
    rule = LearnedClientRateCallback(hyper_lr=0.3)
    runner, _ = train(Classifier(partial(SGD, lr=0.002)), rule=rule, rounds=6, local_steps=3)
    assert rule.summary()["learned_factor"] > 2
    assert float(runner.callback_metrics["learned/factor"]) > 2


class Stumbling(LearnedClientRateCallback):
    """Fails once the third round has been trained."""

    def step(self, cohort, state, server):
        if cohort.round == 2:
            raise RuntimeError("stumbled")
        return super().step(cohort, state, server)


def test_a_round_that_fails_is_undone_and_lost_clients_are_left_out():
    rules = [LearnedClientRateCallback(), Stumbling()]
    train(rule=rules[0], rounds=2, callbacks=[ErasureChannel(0.3)])
    with pytest.raises(RuntimeError, match="stumbled"):
        train(rule=rules[1], rounds=3, callbacks=[ErasureChannel(0.3)])
    assert rules[0].summary() == rules[1].summary()
    assert torch.equal(rules[0].state["tangents"]["factor"], rules[1].state["tangents"]["factor"])


class Meddling(Classifier):
    """Doubles its gradients behind the optimizer's back."""

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            parameter.grad.mul_(2)


class Odd(SGD):
    """A step whose derivative torch does not know."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * torch.from_numpy(parameter.grad.detach().cpu().numpy() * 1.0)
        return loss


def test_what_has_no_derivative_is_refused():
    with pytest.raises(ValueError, match="cannot be learned with `Odd`"):
        train(Classifier(lambda p: Odd(p, lr=0.1)), rule=LearnedClientRateCallback())
    with pytest.raises(ValueError, match="a hook changes gradients"):
        train(Meddling(), rule=LearnedClientRateCallback())
    with pytest.raises(ValueError, match="cannot with `accumulate_grad_batches=2`; use larger batches"):
        train(rule=LearnedClientRateCallback(), accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="cannot with local parameters .*; share them"):
        train(rule=LearnedClientRateCallback(), local_parameters=["net.0.*"])
    with pytest.raises(ValueError, match="rate tangents"):
        channel = DifferentialPrivacyChannel(clip=1.0, noise_multiplier=1.0)
        train(rule=LearnedClientRateCallback(weighting="uniform"), callbacks=[channel])
    with pytest.raises(ValueError, match="`factor`"):
        LearnedClientRateCallback(-1.0)

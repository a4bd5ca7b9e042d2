"""FedNova: normalizers, and an optimum that numbers of steps do not shift."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from federations import Classifier, flat, train
from lightning_fedhaw import FedAvgCallback, FedNovaCallback
from lightning_fedhaw.extending import ClientObjective, ClientVectors, Cohort, ParameterLayout
from lightning_fedhaw.objectives.local_normalizer import normalizer
from lightning_fedhaw.server import Server

MODULE = nn.Linear(1, 1, bias=False, dtype=torch.float64)
SERVER = Server(MODULE, ParameterLayout.of(MODULE))
CURVATURES, OPTIMA, STEPS = torch.tensor([1.0, 3.0]), torch.tensor([1.0, -1.0]), torch.tensor([2, 5])


def local_work(start: float, lr: float, proximal: float = 0.0) -> list[float]:
    """Where plain steps on ``h (x - c)^2 / 2 + proximal (x - start)^2 / 2`` lead each client."""
    ends = []
    for h, c, steps in zip(CURVATURES.tolist(), OPTIMA.tolist(), STEPS.tolist(), strict=True):
        x = start
        for _ in range(steps):
            x -= lr * (h * (x - c) + proximal * (x - start))
        ends.append(x)
    return ends


def one_round(rule, start, ends, lr=0.1, steps=STEPS, examples=(1, 1)):
    x = torch.tensor([start], dtype=torch.float64)
    cohort = Cohort(
        round=0,
        clients=torch.arange(len(ends)),
        num_examples=torch.tensor(examples),
        num_steps=torch.as_tensor(steps),
        received=torch.ones(len(ends), dtype=torch.bool),
        start=x,
        vectors=ClientVectors(torch.tensor(ends, dtype=torch.float64)[:, None] - x, x),
        learning_rates=(lr,),
    )
    return rule.step(cohort, {}, SERVER)


def fixed_point(rule, lr):
    at_0, at_1 = (one_round(rule, x, local_work(x, lr), lr).parameters.item() for x in (0.0, 1.0))
    return at_0 / (1 - at_1 + at_0)  # a round is an affine function of where it starts


def test_one_round_of_two_quadratics():
    ends = local_work(0.0, 0.1)
    assert ends == pytest.approx([0.19, -0.83193])
    step = one_round(FedNovaCallback(), 0.0, ends)
    assert step.parameters.item() == pytest.approx(-0.12492550, abs=1e-8)
    assert step.metrics["tau_eff"] == pytest.approx(3.5)
    assert step.weights.tolist() == [0.5, 0.5]
    assert one_round(FedAvgCallback(), 0.0, ends).parameters.item() == pytest.approx(-0.32096500, abs=1e-8)


@pytest.mark.parametrize(
    ("lr", "nova", "average"),
    [(0.1, -0.27310568, -0.62815457), (0.01, -0.47910106, -0.75304961), (0.001, -0.49793472, -0.76356164)],
)
def test_fixed_points(lr, nova, average):
    """The optimum of the mean loss is -0.5; averages of unequal work settle elsewhere however small the rate."""
    assert fixed_point(FedNovaCallback(), lr) == pytest.approx(nova, abs=1e-7)
    assert fixed_point(FedAvgCallback(), lr) == pytest.approx(average, abs=1e-7)


def test_normalizers():
    assert normalizer(5) == 5
    assert normalizer(5, momentum=0.9) == pytest.approx(13.1441)
    assert normalizer(5, proximal=0.1) == pytest.approx(4.0951)
    assert normalizer(0, momentum=0.9) == 0


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("proximal", [0.0, 0.2])
def test_normalizers_are_what_torch_goes(nesterov, momentum, proximal):
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0, momentum=momentum, nesterov=nesterov)
    for steps in range(1, 8):
        x.grad = -1 + proximal * x.detach()
        optimizer.step()
        assert normalizer(steps, momentum, nesterov, proximal) == pytest.approx(x.item(), rel=1e-12)


def test_a_proximal_term_is_in_the_normalizer():
    lr, mu = 0.1, 1.0
    ends = local_work(0.0, lr, proximal=mu)
    assert ends == pytest.approx([0.18, -0.69168])
    work = [normalizer(steps, proximal=lr * mu) for steps in STEPS.tolist()]
    assert work == pytest.approx([1.9, 4.0951])
    step = one_round(FedNovaCallback(proximal=mu), 0.0, ends)
    mean = (0.18 / 1.9 - 0.69168 / 4.0951) / 2
    assert step.parameters.item() == pytest.approx((1.9 + 4.0951) / 2 * mean)
    by_steps = one_round(FedNovaCallback(proximal=mu, tau_eff="steps"), 0.0, ends)
    assert by_steps.parameters.item() == pytest.approx(3.5 * mean)


def test_equal_numbers_of_steps_are_fedavg():
    ends = [0.3, -0.7]
    for momentum in (0.0, 0.9):
        step = one_round(FedNovaCallback(momentum=momentum), 1.0, ends, steps=[4, 4], examples=(1, 3))
        assert step.parameters.item() == pytest.approx(0.25 * 0.3 - 0.75 * 0.7)


def test_who_made_no_step_keeps_its_share_and_shortens_nobodys_way():
    step = one_round(FedNovaCallback(), 1.0, [0.0, 1.0], steps=[4, 0])
    assert step.parameters.item() == pytest.approx(0.5)
    assert step.metrics["tau_eff"] == pytest.approx(4)
    nobody = one_round(FedNovaCallback(), 1.0, [1.0, 1.0], steps=[0, 0])
    assert nobody.parameters.item() == 1.0


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)


def test_the_momentum_is_read_from_the_clients_optimizer():
    rule = FedNovaCallback()
    runner, module = train(Classifier(momentum), rule=rule, alpha=0.3)
    assert (rule.momentum, rule.nesterov) == (0.9, True)
    assert float(runner.callback_metrics["tau_eff"]) > 10
    _, plain = train(Classifier(momentum), rule=FedNovaCallback(momentum=0.0), alpha=0.3)
    assert not torch.allclose(flat(module), flat(plain), atol=1e-4)


def test_unknown_normalizers_are_refused():
    adam = Classifier(lambda p: torch.optim.Adam(p))
    with pytest.raises(
        ValueError, match=r"`configure_optimizers` gave Adam\. Use such an SGD, or say what comes close"
    ):
        train(adam, rule=FedNovaCallback())
    train(adam, rule=FedNovaCallback(momentum=0.0), rounds=1)
    damped = Classifier(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5))
    with pytest.raises(ValueError, match="gave SGD with dampening, or one that maximizes"):
        train(damped, rule=FedNovaCallback())
    with pytest.raises(ValueError, match='`optimizer_state="kept"` keeps it from round to round'):
        train(Classifier(momentum), rule=FedNovaCallback(), optimizer_state="kept")


class Proximal(ClientObjective):
    def penalty(self, parameters, start, state):
        return 0.5 * sum((p - start[name]).square().sum() for name, p in parameters.items())


def test_a_proximal_federation_reads_the_learning_rate():
    rule = FedNovaCallback(proximal=1.0)
    assert rule.needs_learning_rates
    assert rule.unnormalized_weight is None
    runner, _ = train(rule=rule, callbacks=[Proximal()], rounds=2)
    assert 0 < float(runner.callback_metrics["tau_eff"]) < 4  # of about 4 steps, each shortened by the pull

    def two_rates(module):
        return torch.optim.SGD([{"params": p, "lr": 0.1 * (i + 1)} for i, p in enumerate(module)], lr=0.1)

    with pytest.raises(ValueError, match=r"needs one local learning rate for all parameters, got \[0.1, 0.2"):
        train(Classifier(two_rates), rule=FedNovaCallback(proximal=1.0))


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"`momentum` must be a number in \[0, 1\), got 1.* Or \"auto\""):
        FedNovaCallback(momentum=1)
    with pytest.raises(ValueError, match=r"`proximal` must be a finite number of at least 0, got -1.* Or \"auto\""):
        FedNovaCallback(proximal=-1)
    with pytest.raises(ValueError, match="`tau_eff` must be one of 'normalizer', 'steps', got 'mean'"):
        FedNovaCallback(tau_eff="mean")

"""FedHAW as published: hand-worked numbers, derivatives, and properties that hold for any cohort."""

from __future__ import annotations

import copy
import io
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_fedhaw import FedAvgCallback, PublishedFedHAWCallback
from lightning_fedhaw.aggregation.fedhaw_published import gamma_hypergradient, lambda_hypergradient
from lightning_fedhaw.aggregation.hypergradient import LOGIT_FLOOR
from lightning_fedhaw.extending import ClientVectors, Cohort, ParameterLayout, RuleOutput
from lightning_fedhaw.server import Server
from lightning_fedhaw.vectors.accumulated import AccumulatedVectors

MU, LR_GAMMA, LR_LAMBDA = 0.1, 0.01, 0.05
BEFORE = [[1.0, 2.0], [3.0, -1.0]]
NOW = [[2.0, 0.5], [2.8, -0.6]]
SIZES = [1, 3]
JACOBIANS = ["diagonal", "exact"]

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
jacobians = st.sampled_from(JACOBIANS)


# ---------------------------------------------------------------------- small real things


class TwoTensors(nn.Module):
    """Two parameters, P in all."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.rest = nn.Parameter(torch.zeros(numel - 1, dtype=torch.float64))


def make_server(numel: int = 2) -> Server:
    module = TwoTensors(numel)
    return Server(module, ParameterLayout.of(module))


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def make_cohort(
    models: Any,
    start: Any,
    *,
    clients: Any = None,
    sizes: Any = None,
    steps: Any = None,
    rates: tuple[float, ...] = (MU, MU),
    round_idx: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Cohort:
    """The cohort in which client k's model is ``models[k]``."""
    models, start = tensor(models), tensor(start)
    many = len(models)
    return Cohort(
        round=round_idx,
        clients=torch.arange(many) if clients is None else torch.as_tensor(clients),
        num_examples=torch.ones(many, dtype=torch.int64) if sizes is None else torch.as_tensor(sizes),
        num_steps=torch.ones(many, dtype=torch.int64) if steps is None else torch.as_tensor(steps),
        received=torch.ones(many, dtype=torch.bool),
        start=start.to(dtype),
        vectors=ClientVectors((models - start).to(dtype), start.to(dtype)),
        learning_rates=rates,
    )


def make_rule(**kwargs: Any) -> PublishedFedHAWCallback:
    return PublishedFedHAWCallback(**{"lr_gamma": LR_GAMMA, "lr_lambda": LR_LAMBDA, **kwargs})


def first_step(
    rule: PublishedFedHAWCallback, *, gamma: float = 0.0, before: Any = BEFORE, sizes: Any = SIZES
) -> RuleOutput:
    """The round that comes before the first hyper step, with a log-scale of our choice."""
    start = torch.linspace(-1, 2, len(before[0]), dtype=torch.float64)
    state = rule.init(start, torch.as_tensor(sizes)) | {"gamma": tensor(gamma)}
    return rule.step(make_cohort(before, start, round_idx=0), state, make_server(len(start)))


def two_steps(rule: PublishedFedHAWCallback, *, gamma: float = 0.0, now: Any = NOW, **kwargs: Any) -> RuleOutput:
    """The first hyper step of the hand-worked cases."""
    first = first_step(rule, gamma=gamma)
    return rule.step(make_cohort(now, first.parameters, **kwargs), first.state, make_server())


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_problem(seed: int, many: int = 4, numel: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Models of two cohorts ``[K, P]`` and clients' sizes ``[K]``."""
    draws = draw(seed, 2 * many + 1, numel)
    sizes = torch.randint(1, 50, (many,), generator=torch.Generator().manual_seed(seed))
    common = draws[-1]
    return common + 0.3 * draws[:many], common + 0.3 * draws[many:-1], sizes


def play(rule: PublishedFedHAWCallback, before: Tensor, now: Tensor, sizes: Tensor) -> RuleOutput:
    first = first_step(rule, before=before, sizes=sizes, gamma=0.05)
    return rule.step(make_cohort(now, first.parameters), first.state, make_server(before.shape[1]))


def close(actual: Any, expected: Any, atol: float = 6e-9) -> None:
    torch.testing.assert_close(tensor(actual), tensor(expected), atol=atol, rtol=0)


# ---------------------------------------------------------------------- numbers worked out by hand

HAND = {
    # jacobian, gamma before: gamma, lambda-gradient, lambda, weights, model
    ("diagonal", 0.0): (
        0.026875,
        (0.09892695, -0.74195210),
        (-1.39124071, -0.25058447),
        (0.24219989, 0.75780011),
        (2.67723247, -0.34266663),
    ),
    ("exact", 0.0): (
        0.026875,
        (0.796875, -0.796875),
        (-1.42613811, -0.24783832),
        (0.23535804, 0.76464196),
        (2.68285505, -0.35039768),
    ),
    ("diagonal", 0.1): (
        0.05173732,
        (0.54135693, 0.91509473),
        (-1.41336221, -0.33343681),
        None,
        (2.73509196, -0.33817944),
    ),
    ("exact", 0.1): (
        0.05173732,
        (-0.41161146, 0.41161146),
        (-1.36571379, -0.30826265),
        None,
        (2.73148892, -0.33322526),
    ),
}


@pytest.mark.parametrize(("jacobian", "gamma"), HAND)
def test_one_hyper_step(jacobian, gamma):
    expected_gamma, gradient, lambda_, weights, model = HAND[jacobian, gamma]
    step = two_steps(make_rule(jacobian=jacobian), gamma=gamma)
    close(step.state["gamma"], expected_gamma)
    close((tensor([0.25, 0.75]).log() - step.state["lambda_"]) / LR_LAMBDA, gradient, atol=2e-8)
    close(step.state["lambda_"], lambda_)
    close(step.parameters, model)
    close(step.metrics["hypergradient_lambda"], tensor(gradient).norm(), atol=2e-8)
    close(step.metrics["hypergradient_gamma"], abs(gamma - expected_gamma) / LR_GAMMA, atol=1e-6)
    if weights is not None:
        close(step.weights, weights)


def test_the_two_jacobians_can_disagree_in_sign():
    moves = [two_steps(make_rule(jacobian=j), gamma=0.1).state["lambda_"][0] - math.log(0.25) for j in JACOBIANS]
    assert moves[0] < 0 < moves[1]


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_the_exact_rule_is_the_derivative(gamma):
    """Of ``F(gamma, lambda) = <g, exp(gamma) sum_k s_k u_k>`` with ``g`` held fixed, by central differences."""
    models, lambda_ = tensor(BEFORE), tensor([0.25, 0.75]).log()
    shares = torch.softmax(lambda_, 0)
    w = math.exp(gamma) * shares @ models
    r = (w - shares @ tensor(NOW)) / MU
    g = math.exp(gamma) * r

    def objective(at_gamma: float, at_lambda: Tensor) -> float:
        return float(g @ (math.exp(at_gamma) * torch.softmax(at_lambda, 0) @ models))

    h = 1e-6
    by_gamma = (objective(gamma + h, lambda_) - objective(gamma - h, lambda_)) / (2 * h)
    unit = torch.eye(2, dtype=torch.float64) * h
    by_lambda = [(objective(gamma, lambda_ + e) - objective(gamma, lambda_ - e)) / (2 * h) for e in unit]
    close(gamma_hypergradient(r @ w, tensor(gamma)), by_gamma, atol=1e-8)
    close(lambda_hypergradient(models @ r, shares, tensor(gamma), "exact"), by_lambda, atol=1e-8)
    if gamma == 0.1:
        close(by_gamma, 4.82626821, atol=1e-7)
        close(by_lambda, (-0.41161146, 0.41161146), atol=1e-7)


def test_partial_participation():
    rule = make_rule(jacobian="exact")
    start, server = torch.zeros(2, dtype=torch.float64), make_server()
    state = rule.init(start, torch.tensor([2, 3, 5])) | {"gamma": tensor(0.05)}
    first = rule.step(make_cohort(BEFORE, start, clients=[0, 1], round_idx=0), state, server)
    close(first.weights, (0.4, 0.6))
    close(first.parameters, (2.31279641, 0.21025422))

    second = rule.step(make_cohort(NOW, first.parameters, clients=[1, 2]), first.state, server)
    close(second.state["gamma"], 0.08672450)
    close(second.state["lambda_"], (-1.81734309, -0.99606763, -0.69314718))
    close((first.state["lambda_"] - second.state["lambda_"]) / LR_LAMBDA, (4.15810346, -4.15810346, 0.0), atol=2e-8)
    close(second.weights, (0.42484371, 0.57515629))
    close(second.parameters, (2.68300297, -0.14469149))
    assert second.state["previous_clients"].tolist() == [1, 2]


@pytest.mark.parametrize("gamma_for_lambda", ["new", "old"])
def test_gamma_for_lambda(gamma_for_lambda):
    """The diagonal gradient of case B belongs to gamma = 0.05173732; with the old gamma it is larger by a factor."""
    step = two_steps(make_rule(gamma_for_lambda=gamma_for_lambda), gamma=0.1)
    factor = 1.0 if gamma_for_lambda == "new" else math.exp(2 * (0.1 - 0.05173732))
    gradient = (tensor([0.25, 0.75]).log() - step.state["lambda_"]) / LR_LAMBDA
    close(gradient, factor * tensor((0.54135693, 0.91509473)), atol=5e-8)


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_the_plain_pseudo_gradient_lacks_one_factor_of_the_scale(jacobian):
    kwargs = {"jacobian": jacobian, "gamma_for_lambda": "old"}
    weighted, plain = (two_steps(make_rule(pseudo_gradient=p, **kwargs), gamma=0.1) for p in ("weighted", "plain"))
    for key, before in (("gamma", tensor(0.1)), ("lambda_", tensor([0.25, 0.75]).log())):
        close((before - weighted.state[key]) / (before - plain.state[key]), before * 0 + math.exp(0.1), atol=1e-9)


def test_plain_and_weighted_agree_at_scale_one():
    weighted, plain = (two_steps(make_rule(pseudo_gradient=p, jacobian="exact")) for p in ("weighted", "plain"))
    assert torch.equal(weighted.parameters, plain.parameters)


def test_a_learning_rate_per_parameter():
    """r = (-0.1 / 0.1, 0.075 / 0.2) = (-1, 0.375); <r, w> = -2.59375; <r, u> = (-0.25, -3.375)."""
    step = two_steps(make_rule(jacobian="exact"), rates=(0.1, 0.2))
    close(step.state["gamma"], 0.01 * 2.59375)
    gradient = (tensor([0.25, 0.75]).log() - step.state["lambda_"]) / LR_LAMBDA
    close(gradient, (0.5859375, -0.5859375))


def test_steps_are_divided_out_client_by_client():
    """With 2 and 5 steps, r = 0.25 (0.5, -0.75) / 0.2 + 0.75 (-0.3, 0.35) / 0.5 = (0.175, -0.4125)."""
    step = two_steps(make_rule(jacobian="exact", normalize_by="lr*steps"), steps=[2, 5])
    close(step.state["gamma"], -0.01 * 0.540625)
    gradient = (tensor([0.25, 0.75]).log() - step.state["lambda_"]) / LR_LAMBDA
    close(gradient, (-0.29765625, 0.29765625))


def test_a_client_of_no_steps_counts_as_one():
    rule = make_rule(normalize_by="lr*steps")
    none, one = (two_steps(rule, now=[[2.5, -0.25], [2.8, -0.6]], steps=[n, 5]) for n in (0, 1))
    assert torch.equal(none.parameters, one.parameters)


# ---------------------------------------------------------------------- when it is FedAvg


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_starts_as_fedavg(jacobian):
    rule = make_rule(jacobian=jacobian)
    step = first_step(rule)
    close(step.parameters, (2.5, -0.25))
    assert step.weights.tolist() == pytest.approx([0.25, 0.75])
    assert step.metrics["scale"] == 1.0
    assert step.metrics["hypergradient_gamma"] == step.metrics["hypergradient_lambda"] == 0.0


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_without_step_sizes_it_is_fedavg(jacobian):
    step = two_steps(make_rule(lr_gamma=0.0, lr_lambda=0.0, jacobian=jacobian), sizes=SIZES)
    fedavg = FedAvgCallback().step(make_cohort(NOW, [2.5, -0.25], sizes=SIZES), {}, make_server())
    close(step.parameters, fedavg.parameters, atol=1e-14)
    close(step.weights, fedavg.weights, atol=1e-14)
    assert step.metrics["hypergradient_gamma"] > 0


@given(seeds, jacobians)
@few
def test_any_first_round_is_fedavg(seed, jacobian):
    models, _, sizes = random_problem(seed)
    ours = first_step(make_rule(jacobian=jacobian), before=models, sizes=sizes)
    fedavg = FedAvgCallback().step(make_cohort(models, torch.zeros(5), sizes=sizes), {}, make_server(5))
    close(ours.parameters, fedavg.parameters, atol=1e-12)


# ---------------------------------------------------------------------- properties


@given(seeds, st.floats(-0.5, 0.5), st.floats(-5, 5), st.sampled_from(["weighted", "plain"]))
@few
def test_the_exact_gradient_sums_to_zero_and_ignores_shifts(seed, gamma, shift, pseudo_gradient):
    r_u, lambda_ = draw(seed, 2, 4)
    exact, shifted = (
        lambda_hypergradient(r_u, torch.softmax(at, 0), tensor(gamma), "exact", pseudo_gradient)
        for at in (lambda_, lambda_ + shift)
    )
    close(exact.sum(), 0.0, atol=1e-12)
    close(shifted, exact, atol=1e-12)
    # A part that all pulls share moves no weight.
    close(
        lambda_hypergradient(r_u + shift, torch.softmax(lambda_, 0), tensor(gamma), "exact", pseudo_gradient),
        exact,
        atol=1e-11,
    )


def test_the_diagonal_gradient_does_not():
    r_u, shares = tensor([1.0, 2.0, -0.5]), tensor([0.2, 0.3, 0.5])
    gradient = lambda_hypergradient(r_u, shares, tensor(0.0), "diagonal")
    close(gradient, (0.16, 0.42, -0.125))
    assert abs(gradient.sum()) > 0.4
    assert not torch.allclose(lambda_hypergradient(r_u + 3, shares, tensor(0.0), "diagonal"), gradient)


@given(seeds, st.floats(-0.5, 0.5))
@few
def test_the_exact_gradient_is_what_autograd_finds(seed, gamma):
    models, now, sizes = random_problem(seed)
    at_gamma = tensor(gamma).requires_grad_()
    at_lambda = (sizes.double() / sizes.sum()).log().requires_grad_()
    w = at_gamma.exp() * ClientVectors(models).weighted_sum(torch.softmax(at_lambda, 0))
    shares = torch.softmax(at_lambda.detach(), 0)
    r = (w.detach() - shares @ now) / MU
    by_gamma, by_lambda = torch.autograd.grad((math.exp(gamma) * r) @ w, (at_gamma, at_lambda))
    close(gamma_hypergradient(r @ w.detach(), tensor(gamma)), by_gamma, atol=1e-10)
    close(lambda_hypergradient(models @ r, shares, tensor(gamma), "exact"), by_lambda, atol=1e-10)


@given(seeds, jacobians, st.permutations(range(4)))
@few
def test_the_order_of_clients_does_not_matter(seed, jacobian, order):
    before, now, sizes = random_problem(seed)
    rule = make_rule(jacobian=jacobian)
    straight = play(rule, before, now, sizes)
    permuted = play(rule, before[order], now[order], sizes[order])
    close(permuted.parameters, straight.parameters, atol=1e-11)
    close(permuted.state["lambda_"], straight.state["lambda_"][order], atol=1e-11)
    close(permuted.weights, straight.weights[order], atol=1e-11)


@given(seeds, jacobians, st.permutations(range(4)))
@few
def test_the_order_of_arrival_does_not_matter(seed, jacobian, order):
    before, now, sizes = random_problem(seed)
    rule = make_rule(jacobian=jacobian)
    first = first_step(rule, before=before, sizes=sizes)
    straight = rule.step(make_cohort(now, first.parameters), first.state, make_server(5))
    shuffled = rule.step(make_cohort(now[order], first.parameters, clients=order), first.state, make_server(5))
    close(shuffled.parameters, straight.parameters, atol=1e-11)
    close(shuffled.state["lambda_"], straight.state["lambda_"], atol=1e-11)


@given(seeds, jacobians)
@few
def test_an_orthogonal_change_of_basis_changes_nothing(seed, jacobian):
    before, now, sizes = random_problem(seed)
    rotation, _ = torch.linalg.qr(draw(seed + 1, 5, 5))
    rule = make_rule(jacobian=jacobian)
    straight, rotated = play(rule, before, now, sizes), play(rule, before @ rotation, now @ rotation, sizes)
    close(rotated.state["gamma"], straight.state["gamma"], atol=1e-11)
    close(rotated.state["lambda_"], straight.state["lambda_"], atol=1e-11)
    close(rotated.parameters, straight.parameters @ rotation, atol=1e-11)


@given(seeds, jacobians, st.floats(0.01, 100.0))
@few
def test_scale_bounds(seed, jacobian, lr_gamma):
    before, now, sizes = random_problem(seed)
    step = play(make_rule(jacobian=jacobian, lr_gamma=lr_gamma, scale_bounds=(0.9, 1.2)), before, now, sizes)
    assert 0.9 - 1e-12 <= step.state["gamma"].exp().item() <= 1.2 + 1e-12
    assert step.state["gamma"].exp().item() == pytest.approx(step.metrics["scale"])


@pytest.mark.parametrize(("lr_gamma", "bound"), [(100.0, 2.0), (0.0, 1.0)])
def test_scale_stops_at_its_bound(lr_gamma, bound):
    assert two_steps(make_rule(lr_gamma=lr_gamma, scale_bounds=(0.5, 2.0))).metrics["scale"] == pytest.approx(bound)


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_a_logit_falls_only_so_far(jacobian):
    lambda_ = two_steps(make_rule(lr_lambda=1e6, jacobian=jacobian)).state["lambda_"]
    assert (lambda_.max() - lambda_.min()).item() == pytest.approx(LOGIT_FLOOR)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "kwargs",
    [{"lr_gamma": 1e308, "lr_lambda": 1e308}, {"lr_gamma": 0.0, "lr_lambda": 1e308, "gamma_for_lambda": "old"}],
)
def test_a_step_that_is_not_finite_is_refused(kwargs):
    rule = make_rule(**kwargs)
    now = (10 * tensor(NOW)).tolist()
    first = first_step(rule)
    with pytest.warns(UserWarning, match=r"round 1 .* refused.*Lower `lr_gamma`"):
        step = rule.step(make_cohort(now, first.parameters), first.state, make_server())
    for key in ("gamma", "lambda_"):
        assert torch.equal(step.state[key], first.state[key])
    assert not any(key.endswith("_optimizer") for key in step.state)
    assert step.metrics["hyper_steps_refused"] == 1.0
    close(step.parameters, 0.25 * tensor(now[0]) + 0.75 * tensor(now[1]), atol=1e-12)


def test_a_refused_step_leaves_no_trace_in_the_hyper_optimizer():
    rule = make_rule(hyper_optimizer=torch.optim.Adam, jacobian="exact")
    good = two_steps(rule)
    memory = copy.deepcopy({key: good.state[key] for key in ("gamma_optimizer", "lambda_optimizer")})
    with pytest.warns(UserWarning, match="refused"):
        step = rule.step(make_cohort([[math.inf, 0.0], [1.0, 1.0]], good.parameters), good.state, make_server())
    for key, kept in memory.items():
        for name, value in kept.items():
            assert torch.equal(step.state[key][name], value), (key, name)


def test_a_scale_that_does_not_fit_the_parameters_is_refused():
    rule = make_rule(lr_gamma=20.0, lr_lambda=0.0)
    first = first_step(rule)
    # gamma becomes 53.75: exp(2 gamma) is a number in float64 and none in float32.
    with pytest.warns(UserWarning, match="scale left"):
        rule.step(make_cohort(NOW, first.parameters), first.state, make_server())
    with pytest.warns(UserWarning, match="refused"):
        rule.step(make_cohort(NOW, first.parameters, dtype=torch.float32), first.state, make_server())


def test_a_learning_rate_of_zero():
    with pytest.raises(ValueError, match="divides by the local learning rate, and that of round 1 is 0"):
        two_steps(make_rule(), rates=(0.1, 0.0))


def test_a_running_sum_is_not_enough():
    raw = torch.ones(2, dtype=torch.float64)
    cohort = make_cohort(BEFORE, [0.0, 0.0])
    summed = Cohort(
        **{
            **vars(cohort),
            "vectors": AccumulatedVectors(raw @ tensor(BEFORE), raw, cohort.start, "PublishedFedHAWCallback"),
        }
    )
    rule = make_rule()
    with pytest.raises(RuntimeError, match="`PublishedFedHAWCallback` declares `unnormalized_weight`.* asked for `to`"):
        rule.step(summed, rule.init(cohort.start, torch.tensor(SIZES)), make_server())


@pytest.mark.parametrize(
    ("kwargs", "error", "names"),
    [
        ({"lr_gamma": -1e-3}, ValueError, "`lr_gamma` must be a finite number of at least 0, got -0.001"),
        ({"lr_gamma": "fast"}, ValueError, "`lr_gamma`"),
        ({"lr_gamma": True}, ValueError, "`lr_gamma` must be a finite number of at least 0, got True"),
        ({"learning_rate": "x"}, ValueError, "`learning_rate` must be a finite number above 0, got 'x'"),
        ({"lr_lambda": math.inf}, ValueError, "`lr_lambda`"),
        ({"lr_lambda": math.nan}, ValueError, "`lr_lambda`"),
        ({"jacobian": "full"}, ValueError, "`jacobian` must be one of 'diagonal', 'exact', got 'full'"),
        ({"gamma_for_lambda": "newest"}, ValueError, "`gamma_for_lambda`"),
        ({"pseudo_gradient": "mean"}, ValueError, "`pseudo_gradient`"),
        ({"normalize_by": "norms"}, ValueError, "`normalize_by` must be one of .*, got 'norms'.*`FedHAWCallback`"),
        ({"lr_step": 0.3}, TypeError, "`lr_step` is an argument of `FedHAWCallback`, not of `PublishedFedHAWCallback`"),
        ({"step_bounds": (1, 2)}, TypeError, "`step_bounds` is an argument of `FedHAWCallback`"),
        ({"lr_gama": 0.3}, TypeError, "unexpected keyword argument 'lr_gama'; did you mean `lr_gamma`?"),
        ({"memory": "disk"}, ValueError, "`memory`"),
        ({"learning_rate": 0.0}, ValueError, "`learning_rate` must be a finite number above 0, got 0.0"),
        ({"scale_bounds": (1.1, 2.0)}, ValueError, "`scale_bounds`"),
        ({"scale_bounds": (0.5, math.inf)}, ValueError, "`scale_bounds`"),
        ({"scale_bounds": (0.0, 2.0)}, ValueError, "`scale_bounds`"),
        ({"hyper_optimizer": "adam"}, TypeError, "`hyper_optimizer`"),
        ({"clients_per_round": 0}, ValueError, "`clients_per_round`"),
    ],
)
def test_the_constructor_names_what_is_wrong(kwargs, error, names):
    with pytest.raises(error, match=names):
        PublishedFedHAWCallback(**kwargs)


# ---------------------------------------------------------------------- options


def test_defaults_follow_the_jacobian():
    assert PublishedFedHAWCallback().gamma_for_lambda == "new"
    assert PublishedFedHAWCallback(jacobian="exact").gamma_for_lambda == "old"
    assert PublishedFedHAWCallback(jacobian="exact", gamma_for_lambda="new").gamma_for_lambda == "new"


def test_the_defaults_are_the_authors():
    rule = PublishedFedHAWCallback()
    assert (rule.lr_gamma, rule.lr_lambda) == (1e-3, 1e-2)
    assert (rule.jacobian, rule.pseudo_gradient, rule.normalize_by) == ("diagonal", "weighted", "lr")
    assert (rule.learning_rate, rule.scale_bounds) == (None, None)
    assert rule.hyper_optimizer is torch.optim.SGD
    assert rule.needs_learning_rates


def test_learning_rate_given_or_read():
    assert make_rule().needs_learning_rates
    given_rate = make_rule(learning_rate=MU)
    assert not given_rate.needs_learning_rates
    read = two_steps(make_rule())
    assert torch.equal(two_steps(given_rate, rates=()).parameters, read.parameters)
    # Twice the rate is half the hypergradient.
    halved = two_steps(make_rule(learning_rate=2 * MU), rates=())
    close(halved.state["gamma"], read.state["gamma"] / 2, atol=1e-15)


@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_memory_on_the_host_changes_no_number(jacobian):
    device, host = (two_steps(make_rule(jacobian=jacobian, memory=m)) for m in ("device", "host"))
    assert torch.equal(device.parameters, host.parameters)
    assert all(value.device.type == "cpu" for value in host.state.values() if isinstance(value, Tensor))


def test_scale_before_and_after():
    rule = make_rule()
    assert rule.scale == 1.0
    rule.state = two_steps(rule).state
    assert rule.scale == pytest.approx(math.exp(0.026875))


OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "Adam": torch.optim.Adam,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_hyper_optimizer_survives_a_checkpoint(name):
    def fresh() -> PublishedFedHAWCallback:
        return make_rule(hyper_optimizer=OPTIMIZERS[name], jacobian="exact")

    rule = fresh()
    rule.state = two_steps(rule).state
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    resumed = fresh()
    resumed.load_state_dict(torch.load(file, weights_only=True))

    start = tensor([2.7, -0.3])
    for models in ([[2.1, 0.4], [2.6, -0.5]], [[2.2, 0.1], [2.4, -0.4]]):
        cohort = make_cohort(models, start)
        ours, theirs = (r.step(cohort, r.state, make_server()) for r in (rule, resumed))
        rule.state, resumed.state = ours.state, theirs.state
        assert torch.equal(ours.parameters, theirs.parameters)
        assert torch.equal(ours.state["lambda_"], theirs.state["lambda_"])
        assert ours.metrics == theirs.metrics
        start = ours.parameters


def test_adam_is_adam():
    """The first step of Adam is the sign of the gradient times the step size."""
    step = two_steps(make_rule(hyper_optimizer=torch.optim.Adam, jacobian="exact"))
    close(step.state["gamma"], LR_GAMMA, atol=1e-7)
    close(step.state["lambda_"], tensor([0.25, 0.75]).log() + LR_LAMBDA * tensor([-1.0, 1.0]), atol=1e-7)
    assert step.state["gamma_optimizer"]["step"].item() == 1


def test_momentum_remembers():
    """The second step has 0.9 of the first one in it."""
    plain, heavy = make_rule(), make_rule(hyper_optimizer=partial(torch.optim.SGD, momentum=0.9))
    second = two_steps(plain)
    assert torch.equal(two_steps(heavy).parameters, second.parameters)
    ends = []
    for rule in (plain, heavy):
        before = two_steps(rule)
        after = rule.step(make_cohort(NOW, before.parameters), before.state, make_server())
        ends.append(after.state["gamma"])
    close(ends[1] - ends[0], 0.9 * (second.state["gamma"] - 0.0), atol=1e-12)


def test_momentum_moves_no_absent_client():
    """A client keeps its logit while it is away, even where the hyper-optimizer's momentum would move it."""
    rule = make_rule(jacobian="exact", hyper_optimizer=partial(torch.optim.SGD, momentum=0.9))
    start, server = tensor([0.3, -0.7]), make_server()
    state = rule.init(start, torch.tensor([2, 3, 5]))
    logits = []
    for round_idx, clients in enumerate([[0, 1], [1, 2], [1, 2], [0, 2]]):
        step = rule.step(make_cohort(NOW, start, clients=clients, round_idx=round_idx), state, server)
        start, state = step.parameters, step.state
        logits.append(state["lambda_"])
    assert logits[1][0] != logits[0][0]
    assert logits[2][0] == logits[3][0] == logits[1][0]


# ---------------------------------------------------------------------- what goes in and what comes out


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("jacobian", JACOBIANS)
def test_inputs_are_untouched(jacobian, name):
    rule = make_rule(jacobian=jacobian, hyper_optimizer=OPTIMIZERS[name])
    state = two_steps(rule).state
    cohort = make_cohort(NOW, [2.7, -0.3])
    old_state, old_cohort = copy.deepcopy(state), copy.deepcopy(cohort)
    first, again = (rule.step(cohort, state, make_server()) for _ in range(2))
    assert state.keys() == old_state.keys()
    for key, value in state.items():
        for ours, theirs in zip(_tensors(value), _tensors(old_state[key]), strict=True):
            assert torch.equal(ours, theirs), key
    for key in ("clients", "num_examples", "num_steps", "start"):
        assert torch.equal(getattr(cohort, key), getattr(old_cohort, key))
    assert torch.equal(cohort.vectors.matrix, old_cohort.vectors.matrix)
    assert torch.equal(first.parameters, again.parameters)
    assert rule.state == {}


def _tensors(value: Any) -> list[Tensor]:
    values = value.values() if isinstance(value, dict) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def test_what_is_logged():
    step = two_steps(make_rule())
    assert set(step.metrics) == {
        "gamma",
        "scale",
        "lambda/client_0",
        "lambda/client_1",
        "weight/client_0",
        "weight/client_1",
        "hypergradient_gamma",
        "hypergradient_lambda",
    }
    assert step.metrics["gamma"] == step.state["gamma"].item()
    assert step.metrics["scale"] == pytest.approx(math.exp(0.026875))
    assert step.metrics["lambda/client_1"] == step.state["lambda_"][1].item()
    assert step.metrics["weight/client_1"] == step.weights[1].item()


def test_weights_are_logged_for_the_cohort_and_logits_for_everyone():
    rule = make_rule()
    start = torch.zeros(2, dtype=torch.float64)
    state = rule.init(start, torch.tensor([2, 3, 5]))
    metrics = rule.step(make_cohort(BEFORE, start, clients=[0, 2]), state, make_server()).metrics
    assert {name for name in metrics if "/" in name} == {
        *(f"lambda/client_{k}" for k in (0, 1, 2)),
        *(f"weight/client_{k}" for k in (0, 2)),
    }


@pytest.mark.parametrize("many", [20, 21])
def test_many_clients_are_summarized(many):
    metrics = first_step(make_rule(), before=draw(0, many, 3), sizes=[4] * many).metrics
    names = {name for name in metrics if "/" in name}
    if many == 20:
        assert names == {f"{kind}/client_{k}" for kind in ("lambda", "weight") for k in range(many)}
        return
    assert names == {
        "lambda/min",
        "lambda/max",
        "lambda/mean",
        "weight/min",
        "weight/max",
        "weight/effective_clients",
    }
    assert metrics["weight/effective_clients"] == pytest.approx(many)
    assert metrics["weight/min"] == pytest.approx(1 / many)
    assert metrics["lambda/mean"] == pytest.approx(-math.log(many))

"""FedHAW without units: a round worked by hand, and that nothing of it has units."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aggregation.test_fedhaw_published import make_cohort, make_server
from lightning_fedhaw import FedHAWCallback, PublishedFedHAWCallback
from lightning_fedhaw.aggregation.fedhaw import (
    conditioned,
    longest_step,
    looked_ahead,
    next_scale,
    next_server_step,
    weight_hypergradient,
)
from lightning_fedhaw.argument_names import constructor_names
from lightning_fedhaw.extending import RuleOutput

SIZES = [1, 3]
START = [1.0, 0.0]
FIRST = [[2.0, 0.0], [1.0, 1.0]]
THEN = [[1.25, 1.75], [2.25, 1.75]]

few = settings(max_examples=25, deadline=None)

PLAIN: dict[str, Any] = {"momentum": 0.0, "damping": math.inf}
"""Each round's own mean is the direction."""


def played(
    rule: FedHAWCallback, *rounds: Any, start: Any = START, sizes: Any = SIZES, **kwargs: Any
) -> list[RuleOutput]:
    """Rounds of a rule, each from the model that the one before made; ``rounds`` are the clients' displacements."""
    w = torch.as_tensor(start, dtype=torch.float64)
    state = rule.init(w, torch.as_tensor(sizes))
    steps = []
    for t, moved in enumerate(rounds):
        models = w + torch.as_tensor(moved, dtype=torch.float64)
        step = rule.step(make_cohort(models, w, sizes=sizes, round_idx=t, **kwargs), state, make_server(len(w)))
        w, state = step.parameters, step.state
        steps.append(step)
    return steps


def displaced(models: list[list[float]], start: list[float]) -> list[list[float]]:
    return [[a - b for a, b in zip(model, start, strict=True)] for model in models]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, *expected: float) -> None:
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64).reshape(found.shape), atol=1e-9, rtol=0
    )


def test_two_rounds_by_hand():
    rule = FedHAWCallback(lr_gamma=0.05, lr_lambda=0.5, lr_step=0.3, **PLAIN)
    first, then = played(rule, displaced(FIRST, START), displaced(THEN, [1.25, 0.75]))
    close(first.parameters, 1.25, 0.75)  # FedAvg
    assert first.metrics["server_step"] == 1.0
    close(then.state["beta"], 0.2846049894)  # cosine 0.9486833
    close(then.state["gamma"], 0.05 * 1.6875 / 2.125)
    close(then.state["lambda_"], -1.4050443611, -0.2689320725)
    close(then.weights, 0.2430348644, 0.7569651356)
    close(then.parameters, 2.3475720932, 2.1634557237)


def test_the_momentum_by_hand():
    """Displacements (1, 0) and (0, 1) with momentum 1/2: the mean is (1/4, 1/2), and (1/3, 2/3) without its start."""
    then = played(FedHAWCallback(lr_gamma=0.0, momentum=0.5, damping=math.inf), [[1.0, 0.0]], [[0.0, 1.0]], sizes=[1])[
        -1
    ]
    close(then.state["momentum"], 0.25, 0.5)
    close(looked_ahead(tensor(0.0, 1.0), then.state["momentum"], 0.5, 2), 1 / 6, 5 / 6)
    assert then.state["beta"] == 0
    close(then.parameters, 2 + 1 / 6, 5 / 6)


def test_parameters_that_move_little_move_as_far_as_others():
    """Sizes 1 and 7 have the root mean square 5; with a fifth of it added they are 2 and 8."""
    length = math.hypot(3 / 2, 4 / 8)
    found = conditioned(tensor(3.0, 4.0), tensor(1.0, 49.0), 0.2)
    close(found, 5 * 1.5 / length, 5 * 0.5 / length)
    close(conditioned(tensor(3.0, 4.0), tensor(0.0, 0.0), 0.2), 3.0, 4.0)
    close(conditioned(tensor(3.0, 4.0), tensor(1.0, 49.0), math.inf), 3.0, 4.0)


def test_squares_are_of_all_rounds():
    """Squares 4 and 0 of the first round, 1 and 1 of the second: 0.9 x 0.1 x 4 + 0.1 and 0.1."""
    then = played(FedHAWCallback(), [[2.0, 0.0]], [[1.0, -1.0]], sizes=[1])[-1]
    close(then.state["squares"], 0.46, 0.1)


def test_the_longest_step():
    assert longest_step(10.0, 0.1, 3) == pytest.approx(5.0)  # a twentieth of a hundredfold
    assert longest_step(100.0, 0.1, 40) == pytest.approx(12.5)  # a quarter of a twentieth of a thousandfold
    assert longest_step(10.0, 10.0, 1) == 1.0
    assert longest_step(0.0, 1.0, 4) == 4.0  # a model that starts at zero
    assert longest_step(0.0, 1.0, 400) == 10.0
    assert longest_step(1.0, 0.0, 4) == math.inf


def test_a_step_falls_faster_than_it_grows_and_stays_in_its_bounds():
    one = torch.ones((), dtype=torch.float64)
    close(next_server_step(0 * one, 0.5 * one, 0.3), 0.15)
    close(next_server_step(2 * one, -0.5 * one, 0.3), 1.5)
    close(next_server_step(0 * one, -one, 0.3), 0.0)
    close(next_server_step(math.log(64) * one, one, 0.3), math.log(64))
    close(next_server_step(0 * one, -0.5 * one, 0.3, bounds=(0.1, 2.0)), -0.5)


def test_the_scale_forgets_and_stays_in_its_bounds():
    one = torch.ones((), dtype=torch.float64)
    close(next_scale(0.05 * one, 0.01 * one, 2.0), 0.06)
    close(next_scale(0 * one, one, 2.0), math.log(1.1))
    close(next_scale(0 * one, -one, 2.0), math.log(0.9))


@few
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6))
@pytest.mark.filterwarnings("ignore:FedHAWCallback's model of round")
def test_no_unit_matters(seed, unit):
    """A model and displacements a thousand times as large: the same step, scale and weights."""
    draw = torch.Generator().manual_seed(seed)
    start, moves = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((5,), (3, 4, 5)))
    rule = FedHAWCallback(lr_gamma=0.1, lr_lambda=1.0)
    plain, scaled = (played(rule, *(u * moves), start=u * start, sizes=[1, 2, 3, 4])[-1] for u in (1.0, unit))
    for name in ("beta", "gamma", "lambda_"):
        torch.testing.assert_close(scaled.state[name], plain.state[name], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(scaled.parameters, unit * plain.parameters, rtol=1e-8, atol=1e-9 * unit)


@few
@given(st.integers(0, 2**31))
def test_weights_are_in_the_order_of_agreement(seed):
    draw = torch.Generator().manual_seed(seed)
    moves = torch.randn(4, 6, generator=draw, dtype=torch.float64)
    rule = FedHAWCallback(lr_lambda=1.0)
    weights = played(rule, moves, moves, start=[0.0] * 6, sizes=[1] * 4)[-1].weights
    assert torch.equal(weights.argsort(), (moves @ moves.mean(0)).argsort())


def test_without_step_sizes_it_is_fedavg():
    rule = FedHAWCallback(lr_gamma=0.0, lr_lambda=0.0, lr_step=0.0, **PLAIN)
    moves = displaced(FIRST, START)
    for step, w in zip(played(rule, moves, moves), ([1.25, 0.75], [1.5, 1.5]), strict=True):
        close(step.parameters, *w)


def test_weights_that_are_not_learned_keep_no_models():
    state = played(FedHAWCallback(lr_lambda=0.0), displaced(FIRST, START))[-1].state
    kept = {"gamma", "beta", "lambda_", "rounds", "direction", "momentum", "squares"}
    assert set(state) == {*kept, "longest_norm", "guarded_rounds"}
    state = played(FedHAWCallback(lr_lambda=0.3), displaced(FIRST, START))[-1].state
    assert {"previous", "previous_clients"} < set(state)


@pytest.mark.parametrize("still", [0, 1])
def test_a_round_in_which_nothing_moves_changes_nothing(still):
    rounds = [displaced(FIRST, START), displaced(FIRST, START)]
    rounds[still] = [[0.0, 0.0], [0.0, 0.0]]
    last = played(FedHAWCallback(lr_gamma=0.0, lr_lambda=1.0, **PLAIN), *rounds)[-1]
    assert last.state["beta"] == 0
    assert last.metrics["agreement"] == 0
    close(last.weights, 0.25, 0.75)
    close(last.parameters, 1.25, 0.75)


def test_a_model_that_is_zero_has_no_growth():
    steps = played(FedHAWCallback(lr_gamma=1.0), [[0.0, 0.0], [0.0, 0.0]], displaced(FIRST, START), start=[0.0, 0.0])
    assert steps[-1].state["gamma"] == 0
    assert torch.isfinite(steps[-1].parameters).all()


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({"lr_step": -0.1}, "`lr_step`"),
        ({"step_bounds": (1.5, 3.0)}, "`step_bounds`"),
        ({"step_bounds": 20.0}, "`step_bounds`"),
        ({"scale_bounds": (1.1, 2.0)}, "`scale_bounds`"),
        ({"lr_gamma": -1e-3}, "`lr_gamma` must be a finite number of at least 0, got -0.001"),
        ({"lr_lambda": math.nan}, "`lr_lambda`"),
        ({"memory": "disk"}, "`memory`"),
        ({"momentum": 1.0}, "`momentum`"),
        ({"damping": 0.0}, "`damping`"),
        ({"guard": 1}, "`guard`"),
    ],
)
def test_the_constructor_names_what_is_wrong(kwargs, names):
    with pytest.raises(ValueError, match=names):
        FedHAWCallback(**kwargs)


PUBLISHED = {
    "jacobian": "exact",
    "gamma_for_lambda": "old",
    "pseudo_gradient": "plain",
    "normalize_by": "lr",
    "learning_rate": 0.1,
    "takes_substitutes": False,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_argument_of_the_published_rule_names_that_rule(name):
    sentence = f"^`{name}` is an argument of `PublishedFedHAWCallback`, not of `FedHAWCallback`. Use that class.$"
    with pytest.raises(TypeError, match=sentence):
        FedHAWCallback(**{name: PUBLISHED[name]})
    assert name in vars(PublishedFedHAWCallback(**{name: PUBLISHED[name]}))


def test_an_argument_belongs_to_one_rule_or_to_both():
    """Each class points to the other one for exactly those arguments that only the other one takes."""
    free, published = (set(constructor_names(kind)) for kind in (FedHAWCallback, PublishedFedHAWCallback))
    assert set(FedHAWCallback.arguments_elsewhere) == published - free
    assert set(PublishedFedHAWCallback.arguments_elsewhere) == free - published


def test_the_defaults():
    rule = FedHAWCallback()
    assert (rule.lr_gamma, rule.lr_lambda, rule.lr_step) == (1.0, 0.0, 0.5)
    assert (rule.momentum, rule.damping, rule.guard) == (0.8, 0.25, True)
    assert not rule.keeps_cohort
    assert (rule.scale_bounds, rule.step_bounds) == ((0.9, 1.1), (1.0, 64.0))
    assert rule.hyper_optimizer is torch.optim.SGD
    assert not rule.needs_learning_rates


def test_the_hypergradient_of_the_weights_by_hand():
    """|d| = 5, rms = sqrt(0.25 4^2 + 0.75 2^2) = sqrt(7); the products less their mean are 7.5 and -2.5."""
    gradient = weight_hypergradient(tensor(10.0, 0.0), tensor(4.0, 2.0), tensor(5.0)[0], tensor(0.25, 0.75))
    unit = 5 * math.sqrt(7)
    close(gradient, -0.25 * 7.5 / unit, 0.75 * 2.5 / unit)


def test_the_hypergradient_of_the_weights_is_the_derivative_of_minus_the_product():
    """Of ``-<d, sum_k softmax(lambda)_k d'_k>``, with the lengths held fixed."""
    moved, now = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:2]
    now = now[0]
    lambda_ = tensor(0.1, -0.3, 0.5, 0.0).requires_grad_()
    shares = torch.softmax(lambda_, 0)
    lengths = now.norm() * (shares * moved.square().sum(1)).sum().sqrt()
    (expected,) = torch.autograd.grad(-(now @ (shares @ moved)) / lengths.detach(), lambda_)
    found = weight_hypergradient(moved @ now, moved.norm(dim=1), now.norm(), shares.detach())
    close(found, *expected.tolist())


def test_the_scale_is_advised_against_where_its_bounds_are_wide():
    rule = FedHAWCallback(scale_bounds=(0.1, 10.0))
    rule.state = {"gamma": tensor(math.log(3.0))[0]}
    assert rule.divergence_hint() == (
        " FedHAW's scale stands at 3, and it multiplies the model every round: lower `lr_gamma` (1.0), or narrow"
        " `scale_bounds` (0.1, 10.0)."
    )
    rule.state = {"gamma": tensor(0.1)[0]}
    assert rule.divergence_hint() == ""

"""Programs that a careless or an unlucky author writes: they are right in every mode, or refused."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_fedhaw import autodiff as ad
from lightning_fedhaw.autodiff import modes

MODES = ("forward", "reverse", "mixed")
each_mode = pytest.mark.parametrize("mode", MODES)


CLIENTS = ad.Clients(range(3))
DATA = ad.place([1.0, 2.0, 3.0], CLIENTS)
X = torch.tensor(2.0, dtype=torch.float64)


def total(function, *values):
    """The sum over clients of a function of what is broadcast and of 1, 2, 3."""
    return ad.sum(ad.map_clients(function, *(ad.broadcast(value, CLIENTS) for value in values), DATA))


def square(x):
    return total(lambda x, k: k * x * x, x)


def derivative(program, mode, *values, wrt="x", **options):
    return ad.value_and_grad(program, wrt, mode, **options)(*values)


# ---------------------------------------------------------------- right in every mode


@each_mode
def test_nested_containers_and_several_arguments(mode):
    def program(a, b, steps):
        scaled = total(lambda a, b, k: {"s": [k * (a["u"][0] * b).sum()], "t": (k * a["v"], b)}, a, b)
        return steps * scaled["s"][0] + scaled["t"][0] * scaled["t"][1].sum()

    a = {"u": [torch.tensor([1.0, 2.0])], "v": torch.tensor(3.0)}
    b = torch.tensor([1.0, -1.0])
    found = derivative(program, mode, a, b, 2, wrt=("a", "b"))
    # 2 * 6 * (u . b) + 6 v * 3 (b_1 + b_2)
    assert found.gradient["a"]["u"][0].tolist() == [12.0, -12.0]
    assert found.gradient["a"]["v"] == 0
    assert found.gradient["b"].tolist() == [12.0 + 54, 24.0 + 54]


def test_a_program_without_clients():
    for mode in MODES:
        assert derivative(lambda x: (x**3).sum(), mode, torch.tensor([1.0, 2.0])).gradient.tolist() == [3.0, 12.0]
    found = derivative(lambda x: (x**3).sum(), "auto", torch.tensor([1.0, 2.0]))
    assert found.mode == "reverse", "forward mode would compute the program twice"
    assert found.traffic.down == found.traffic.up == 0


@each_mode
def test_clients_that_the_program_captures_are_accounted(mode):
    found = derivative(square, mode, X)
    assert found.gradient == 24
    sheet = ad.cost(square, "x")(X)
    assert found.traffic.down == sheet.down + sheet.modes[mode].down == {"forward": 2, "reverse": 2, "mixed": 1}[mode]
    with pytest.raises(RuntimeError, match="Clients \\[0\\] are gone"):
        derivative(square, "reverse", X, drop_outs=ad.DropOuts([0]))
    assert CLIENTS.drop_outs is None


@each_mode
def test_data_that_asks_for_a_gradient_by_mistake(mode):
    data = ad.place([torch.tensor(k, requires_grad=True) for k in (1.0, 2.0, 3.0)], CLIENTS)

    def local(x, k):
        (slope,) = ad.gradient(lambda x: k * x**3, x)
        return x - 0.1 * slope

    def round_(x, hyper, round_idx):
        return ad.mean(ad.map_clients(local, ad.broadcast(x, CLIENTS), data))

    for checkpointed in (False, True):
        found = derivative(lambda x, c=checkpointed: ad.unroll(round_, x, None, 1, checkpointed=c), mode, X)
        assert float(found.gradient) == pytest.approx(1 - 0.1 * 2 * 6 * 2.0)
    with pytest.raises(ValueError, match="does not depend on `wrt`='x'"):
        derivative(lambda x: ad.sum(ad.map_clients(lambda k: k * k, data)), mode, X)


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_that_differ(dtype, mode):
    """Small integers, which bfloat16 represents: the numbers are exact, and have the dtype of the argument."""

    def program(x):
        def local(x, w, k):
            return {"wider": k * (w * x).sum(), "outer": k * torch.outer(w, x.float()), "same": k * x}

        sums = total(local, x, torch.tensor([0.0, 1.0, 2.0]))
        return sums["wider"] + sums["outer"].sum() + sums["same"].sum()

    found = derivative(program, mode, torch.tensor([2.0, 1.0, 1.0], dtype=dtype))
    assert found.gradient.dtype == dtype
    assert found.gradient.tolist() == [0 + 18 + 6, 6 + 18 + 6, 12 + 18 + 6]


@each_mode
def test_a_model_in_bfloat16(mode):
    network = nn.Linear(3, 2).to(torch.bfloat16)
    inputs = torch.ones(4, 3, dtype=torch.bfloat16)

    def program(rate, model):
        def local(model, rate, k):
            names = list(model)
            loss = lambda *v: functional_call(network, dict(zip(names, v, strict=True)), (inputs,)).square().sum()  # noqa: E731
            slopes = ad.gradient(loss, *model.values())
            return {name: rate * slope for name, slope in zip(names, slopes, strict=True)}

        steps = total(local, model, rate)
        return sum(step.float().sum() for step in steps.values())

    model = {name: torch.full_like(value, 0.5).detach() for name, value in network.named_parameters()}
    found = derivative(program, mode, torch.tensor(1.0, dtype=torch.bfloat16), model, wrt="rate")
    # An output is 2 and its slope 4, for 4 samples: 16 for each of 8 parameters, from 3 clients.
    assert found.gradient == 16 * 8 * 3


def test_counts_are_added_as_counts():
    flags = ad.place([torch.tensor([True, False])] * 3, CLIENTS)
    assert ad.sum(flags).tolist() == [3, 0]
    small = ad.place([torch.tensor(100, dtype=torch.int8)] * 3, CLIENTS)
    assert ad.sum(small) == 300
    assert ad.sum(ad.place([torch.ones(0)] * 3, CLIENTS)).shape == (0,)


@each_mode
def test_two_sums_of_one_value(mode):
    def program(x):
        value = ad.map_clients(lambda x, k: k * x * x, ad.broadcast(x, CLIENTS), DATA)
        return ad.sum(value) * ad.mean(value)

    assert derivative(program, mode, X).gradient == pytest.approx(12 * 4 * 2.0**3)


@each_mode
def test_a_clients_value_that_later_rounds_use_again(mode):
    """Broadcasts follow sums, and a client's first value comes back in both later messages."""

    def program(x):
        first = ad.map_clients(lambda x, k: k * x, ad.broadcast(x, CLIENTS), DATA)
        s = ad.sum(first)  # 6 x
        second = ad.map_clients(torch.mul, first, ad.broadcast(s, CLIENTS))  # k x * 6 x
        t = ad.sum(second)  # 36 x^2
        u = ad.sum(ad.map_clients(torch.mul, first, ad.broadcast(s * t, CLIENTS)))  # 6 x * 6 x * 36 x^2
        return u + t

    assert derivative(program, mode, X).gradient == pytest.approx(4 * 36 * 36 * 2.0**3 + 72 * 2.0)
    traffic = derivative(program, mode, X).traffic
    sheet = ad.cost(program, "x")(X)
    assert (traffic.down, traffic.up) == (sheet.down + sheet.modes[mode].down, sheet.up + sheet.modes[mode].up)
    assert traffic.rounds == sheet.rounds + sheet.modes[mode].rounds


@each_mode
def test_gradients_by_torch_func_and_under_no_grad(mode):
    with torch.no_grad():
        found = derivative(lambda x: total(lambda x, k: torch.func.grad(lambda w: k * w**3)(x), x), mode, X)
        assert found.gradient == 72
    with torch.inference_mode():
        assert derivative(square, mode, X).gradient == 24
    assert ad.cost(lambda x: total(lambda x, k: torch.func.grad(lambda w: k * w**3)(x), x), "x")(X).up == 1


@each_mode
def test_weights_of_the_server_and_messages_that_depend_on_it(mode):
    """Sum over k of w_k k x, with w = (x, x^2, 1): x^2 + 2 x^3 + 3 x. The weights are never sent."""

    def program(x):
        messages = ad.map_clients(lambda x, k: {"m": [k * x]}, ad.broadcast(x, CLIENTS), DATA)
        return ad.weighted_sum(messages, torch.stack([x, x * x, torch.ones(())]))["m"][0]

    found = derivative(program, mode, X)
    assert found.value == 4 + 16 + 6
    assert found.gradient == pytest.approx(2 * 2 + 6 * 4 + 3)
    sheet = ad.cost(program, "x")(X)
    assert (sheet.down, sheet.up) == (1, 1)
    assert (found.traffic.down, found.traffic.up) == (1 + sheet.modes[mode].down, 1 + sheet.modes[mode].up)
    leaf = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(program(leaf), leaf, create_graph=True)
    assert torch.autograd.grad(slope, leaf)[0] == pytest.approx(2 + 12 * 2)


@each_mode
def test_the_derivative_in_the_weights_alone_is_the_servers_own(mode):
    def program(x):
        return ad.weighted_sum(ad.place([torch.ones(5) * k for k in (1.0, 2.0, 3.0)], CLIENTS), x).sum()

    sheet = ad.cost(program, "x")(torch.ones(3))
    found = derivative(program, mode, torch.ones(3))
    assert found.gradient.tolist() == [5, 10, 15]
    if mode != "forward":  # a pass for every weight, in which the messages travel again
        assert (found.traffic.down, found.traffic.up) == (0, 5) == (sheet.down, sheet.up)


@each_mode
def test_what_a_program_returns_besides_is_not_differentiated(mode):
    def program(x):
        kept = ad.map_clients(lambda x, k: {"own": k * x}, ad.broadcast(x, CLIENTS), DATA)
        return ad.sum(kept)["own"], {"model": x * 3, "kept": kept, "round": 1}

    found = derivative(program, mode, X, has_aux=True)
    assert (found.value, found.gradient) == (12, 6)
    assert (found.aux["model"], found.aux["round"]) == (6, 1)
    assert not found.aux["model"].requires_grad
    assert [value["own"] for value in found.aux["kept"].values] == [2, 4, 6]
    again = derivative(lambda x: square(x) + ad.sum(found.aux["kept"])["own"], mode, X)
    assert (again.value, again.gradient) == (24 + 12, 24), "the next call knows it as a constant"
    with pytest.raises(TypeError, match="must return `\\(result, aux\\)`, got tensor"):
        derivative(square, mode, X, has_aux=True)


# ---------------------------------------------------------------- rounds


def drifting(x, rounds, **options):
    """``x -> x - x^2 / 10`` in every round: clients 1, 2, 3 take steps of x^2 / 20 times 1, 2, 3."""

    def round_(state, hyper, round_idx):
        assert state["round"] == round_idx
        step = ad.mean(
            ad.map_clients(lambda x, k: k * x * x / 20, ad.broadcast(state["x"], state["clients"]), state["data"])
        )
        return {**state, "x": state["x"] - step, "round": state["round"] + 1}

    start = {"x": x, "round": 0, "clients": CLIENTS, "data": DATA, "kept": torch.tensor(3)}
    return ad.unroll(round_, start, None, rounds, **options)["x"]


def drifted(x, rounds):
    slope = 1.0
    for _ in range(rounds):
        slope *= 1 - x / 5
        x -= x * x / 10
    return slope


@each_mode
@pytest.mark.parametrize("checkpointed", [False, True])
def test_states_of_a_round_hold_more_than_tensors(mode, checkpointed):
    found = derivative(lambda x: drifting(x, 4, checkpointed=checkpointed), mode, X)
    assert float(found.gradient) == pytest.approx(drifted(2.0, 4), rel=1e-13)


@each_mode
@pytest.mark.parametrize("horizon", [1, 2, 3, 4, 9])
def test_a_horizon_is_the_same_in_every_mode(mode, horizon):
    """The derivative in a rate that every round uses: rounds before the horizon do not count."""

    def program(rate):
        def round_(x, rate, round_idx):
            return x - ad.mean(ad.map_clients(lambda x, r, k: r * k * x * x, *both(x, rate), DATA))

        return ad.unroll(round_, torch.tensor(2.0), rate, 4, horizon=horizon)

    def both(x, rate):
        return ad.broadcast(x, CLIENTS), ad.broadcast(rate, CLIENTS)

    x, slope, rate = 2.0, 0.0, 0.05
    for round_idx in range(4):
        if round_idx == 4 - horizon:
            slope = 0.0
        slope = slope * (1 - 4 * rate * x) - 2 * x * x
        x -= rate * 2 * x * x
    found = derivative(program, mode, torch.tensor(rate), wrt="rate")
    assert float(found.value) == pytest.approx(x)
    assert float(found.gradient) == pytest.approx(slope, rel=1e-13)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_drop_outs_of_several_rounds(checkpointed):
    """Round 1 loses client 2, of weight 3 / 6: its slope is 1 - (1 - 1/2) x_1 / 5, or all of it where reweighted."""

    def program(x):
        return drifting(x, 3, checkpointed=checkpointed)

    def lost(round_idx):
        return {2} if round_idx == 1 else set()

    x = [2.0, 2 - 0.4, 1.6 - 0.256]
    full = [1 - value / 5 for value in x]
    assert float(derivative(program, "reverse", X).gradient) == pytest.approx(math.prod(full))
    for policy, factor in (("drop", 0.5), ("reweight", 0.75), ("stored", 1.0)):
        found = derivative(program, "reverse", X, drop_outs=ad.DropOuts(lost, policy))
        expected = full[0] * (1 - factor * x[1] / 5) * full[2]
        assert float(found.gradient) == pytest.approx(expected, rel=1e-12), policy
        if policy != "stored":
            assert found.traffic.missing_weight == [pytest.approx(1 / 3)]
    weighted = derivative(program, "reverse", X, drop_outs=ad.DropOuts(lost, "reweight", [1, 2, 3]))
    assert float(weighted.gradient) == pytest.approx(math.prod(full))
    with pytest.raises(RuntimeError, match=r"Clients \[2\] are gone in the reverse pass of round 1"):
        derivative(program, "reverse", X, drop_outs=ad.DropOuts(lost))
    for mode in ("forward", "mixed"):
        assert float(derivative(program, mode, X, drop_outs=ad.DropOuts(lost)).gradient) == pytest.approx(
            math.prod(full)
        ), "asks nobody again"


def test_drop_outs_without_unroll_count_the_rounds_of_communication():
    """6 x in round 0, then 6 * 6 x: the derivative 36 loses 1 / 6 of a round to client 0."""

    def program(x):
        return total(lambda x, k: k * x, total(lambda x, k: k * x, x))

    for gone, expected in ((0, 30), (1, 30), (2, 36)):
        drop_outs = ad.DropOuts(lambda round_idx, gone=gone: {0} if round_idx == gone else set(), "drop")
        assert derivative(program, "reverse", X, drop_outs=drop_outs).gradient == expected


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("mode", ["reverse", "mixed", "auto"])
def test_a_gradient_that_forgets_its_derivative_is_refused(mode):
    def by_grad(w, k):
        (slope,) = torch.autograd.grad(k * w**3, w)
        return w - 0.1 * slope

    def by_backward(w, k):
        inner = w * 1
        inner.retain_grad()
        (k * inner**3).backward()
        return w - 0.1 * inner.grad

    for local in (by_grad, by_backward):
        with pytest.raises(RuntimeError, match=r"without `create_graph=True`.* Take it by `autodiff.gradient`"):
            derivative(lambda x, local=local: total(local, x), mode, X)

    def by_hand(w, k):
        (slope,) = torch.autograd.grad(k * w**3, w, create_graph=True)
        return w - 0.1 * slope

    def constant(w, k):
        inner = w.detach().requires_grad_()
        (slope,) = torch.autograd.grad(k * inner**3, inner)
        return w - 0.1 * slope

    assert derivative(lambda x: total(by_hand, x), mode, X).gradient == pytest.approx(3 - 0.1 * 6 * 6 * 2)
    assert derivative(lambda x: total(constant, x), mode, X).gradient == 3, "meant as a constant, as it says"


@pytest.mark.parametrize("mode", ["reverse", "mixed", "auto"])
def test_a_server_value_that_was_never_sent_is_refused(mode):
    """With several processes, each would keep its own part of such a derivative."""
    refused = pytest.raises(RuntimeError, match="depends on a differentiated server value that was never sent")
    with refused:
        derivative(lambda x: ad.sum(ad.map_clients(lambda k: k * x, DATA)), mode, X)
    with refused:
        derivative(lambda x: ad.sum(ad.place([x, x, x], CLIENTS)), mode, X)
    with refused:
        derivative(lambda x: (lambda s: total(lambda x, k: k * x * s, x))(square(x)), mode, X)

    def captures(state, x, round_idx):
        return state + total(lambda s, k: k * s * x, state)

    for checkpointed in (False, True):
        with refused:
            derivative(lambda x, c=checkpointed: ad.unroll(captures, X, x, 2, checkpointed=c), mode, X)


@each_mode
def test_more_mistakes_are_refused_in_a_sentence(mode):
    def expect(error, text, program, *values, **options):
        with pytest.raises(error, match=text):
            derivative(program, mode, *values, **options)

    expect(ValueError, "does not depend on `wrt`='y'", lambda x, y: square(x), X, X, wrt=("x", "y"))
    expect(TypeError, "must name each argument once", square, X, wrt=("x", "x"))
    expect(TypeError, "without entries, of shape \\[0\\]", lambda x: square(x[0]), [X, torch.ones(0)])
    expect(TypeError, "sends tensors, numbers, .* got Linear. Of a module", lambda x: total(max, nn.Linear(1, 1)), X)
    expect(TypeError, "`weights` of `mean` are numbers", lambda x: ad.mean(DATA, weights=x), torch.ones(3))
    expect(ValueError, "must not add up to 0", lambda x: ad.mean(DATA, weights=[0, 0, 0]), X)
    expect(ValueError, "one entry for each of the 3 clients, got 2", lambda x: ad.mean(DATA, weights=[1, 1]), X)
    expect(TypeError, "`weighted_sum` mixes a value at the clients", lambda x: ad.weighted_sum(x, x), X)
    expect(ValueError, "the shape \\[3\\], got list", lambda x: ad.weighted_sum(DATA, [1, 2, 3]), X)
    expect(
        ValueError,
        r"Client 0 sends \[\(\[1\], torch.float64\)\], and client 1 sends \[\(\[2\]",
        lambda x: total(lambda x, k: x * torch.ones(int(k)), x),
        X,
    )

    def nested(x):
        return ad.value_and_grad(lambda x: square(x) * x, "x", "reverse")(x).gradient * x

    expect(TypeError, "cannot be differentiated, and are called within a program", nested, X)


def test_shapes_that_depend_on_values_have_no_account():
    def program(x):
        return total(lambda x, k: k * x[x > 0].sum(), x)

    assert derivative(program, "mixed", torch.tensor([2.0, -1.0])).gradient.tolist() == [6, 0]
    with pytest.raises(ValueError, match="has shapes that depend on it"):
        derivative(program, "auto", torch.tensor([2.0, -1.0]))


def test_a_failed_derivative_leaves_nothing_behind():
    def fails(x, k):
        raise ArithmeticError("no")

    before = CLIENTS.traffic
    for mode in MODES:
        with pytest.raises(ArithmeticError, match="no"):
            derivative(lambda x: total(fails, x), mode, X)
    assert CLIENTS.traffic is before
    assert CLIENTS.is_accounted
    assert derivative(square, "reverse", X).gradient == 24


# ---------------------------------------------------------------- accounts


def two_arguments(x, y):
    """Each message depends on one of the arguments, and a message without use travels beside them."""
    total(lambda x, k: k * x.square(), x)
    sums = total(lambda a, b, k: {"a": k * a, "b": k * b * b}, x, y)
    return sums["a"].sum() * sums["b"].sum()


ACCOUNTED = {
    "two arguments": (two_arguments, (torch.ones(2), torch.ones(3)), ("x", "y")),
    "a horizon": (lambda x: drifting(x, 4, horizon=1) * x, (X,), "x"),
    "checkpoints": (lambda x: drifting(x, 4, checkpointed=True), (X,), "x"),
    "checkpoints and a horizon": (lambda x: drifting(x, 4, checkpointed=True, horizon=2) * square(x), (X,), "x"),
    "several outputs": (lambda x: total(lambda x, k: k * x * x, total(lambda x, k: k * x, x)), (torch.ones(2),), "x"),
}


@each_mode
@pytest.mark.parametrize("name", ACCOUNTED)
def test_the_cost_sheet_is_what_is_counted(name, mode):
    program, values, wrt = ACCOUNTED[name]
    sheet = ad.cost(program, wrt)(*values)
    extra = sheet.modes[mode]
    traffic = ad.jacobian(program, wrt, mode)(*values).traffic
    assert (traffic.down, traffic.up) == (sheet.down + extra.down, sheet.up + extra.up)
    assert traffic.rounds == sheet.rounds + extra.rounds


def test_checkpoints_keep_the_tape_of_one_round():
    kept = ad.cost(lambda x: drifting(x, 4), "x")(X).modes["reverse"]
    again = ad.cost(lambda x: drifting(x, 4, checkpointed=True), "x")(X).modes["reverse"]
    assert kept.client_memory == 4 * again.client_memory > 0
    assert again.rounds == 8
    assert kept.rounds == 4


def test_the_automatic_mode_is_decided_once_for_arguments_of_one_form(monkeypatch):
    accounts = []
    original = modes.cost
    monkeypatch.setattr(modes, "cost", lambda *args, **options: accounts.append(1) or original(*args, **options))

    def program(x, data, scale):
        messages = ad.map_clients(lambda x, k: scale * k * x.square(), ad.broadcast(x, CLIENTS), data)
        return ad.sum(messages).sum()

    differentiate = ad.value_and_grad(program, "x")
    for size, scale, modes_sought in ((1, 2, 1), (1, 2, 1), (4, 2, 2), (4, 3, 3), (1, 2, 3)):
        found = differentiate(torch.ones(size), DATA, scale)
        assert found.gradient.tolist() == [12.0 * scale] * size
        assert found.mode == ("mixed" if size == 1 else "reverse")
        assert len(accounts) == modes_sought

"""Federated automatic differentiation: numbers worked by hand, the three modes, and what they send."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_fedhaw import autodiff as ad
from lightning_fedhaw.autodiff.primitives import Broadcast, Sum

MODES = ("forward", "reverse", "mixed")
each_mode = pytest.mark.parametrize("mode", MODES)


def distance(x, target):
    return 0.5 * (x - target).square().sum()


# ---------------------------------------------------------------- section 3.4 of the paper, by hand

A = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]], dtype=torch.float64)


def distilled(x, targets):
    """The server distills three numbers to two, and clients answer with a loss."""
    return ad.sum(ad.map_clients(distance, ad.broadcast(A @ x, targets.clients), targets))


def distilled_arguments():
    clients = ad.Clients(range(2))
    return torch.tensor([1.0, 2.0, 0.5]), ad.place([torch.zeros(2), torch.ones(2)], clients)


SENT = {"forward": (12, 6, 3), "reverse": (3, 3, 2), "mixed": (2, 3, 1)}


@each_mode
def test_the_papers_example(mode):
    """u = (2, 1.5); losses 3.125 and 0.625; (3, 2) A = (3, 2, 4)."""
    derivative = ad.value_and_grad(distilled, wrt="x", mode=mode)(*distilled_arguments())
    assert derivative.value == 3.75
    assert derivative.gradient.tolist() == [3.0, 2.0, 4.0]
    assert (derivative.traffic.down, derivative.traffic.up, derivative.traffic.rounds) == SENT[mode]


def test_automatic_choice_sends_least():
    derivative = ad.value_and_grad(distilled, wrt="x")(*distilled_arguments())
    assert derivative.mode == "mixed"
    sheet = ad.cost(distilled, wrt="x")(*distilled_arguments())
    assert sheet.modes["reverse"].asks_again
    assert sheet.sums_only
    assert "mixed" in str(sheet)


# ---------------------------------------------------------------- two rounds, three learned quantities, by hand


def federated_momentum(hyper, starts, probe):
    """One round of FedAvgM with weights n^q, and the loss of the new model on other clients."""
    clients = starts.clients
    model, velocity = torch.ones(2), torch.tensor([0.2, -0.1])

    def train(w, target, q, n):
        (slope,) = ad.gradient(lambda w: distance(w, target), w)
        weight = n**q
        return weight * 0.5 * slope, weight

    sizes = ad.place([torch.tensor(1.0), torch.tensor(3.0)], clients)
    at_clients = ad.broadcast(model, clients)
    total, weight = ad.sum(ad.map_clients(train, at_clients, starts, ad.broadcast(hyper["q"], clients), sizes))
    velocity = hyper["momentum"] * velocity + total / weight
    model = model - hyper["lr"] * velocity
    return ad.mean(ad.map_clients(distance, ad.broadcast(model, clients), probe))


HYPER = {"lr": 1.0, "momentum": 0.9, "q": 1.0}


def momentum_arguments(clients=None):
    clients = clients or ad.Clients(range(2))
    starts = ad.place([torch.zeros(2), torch.tensor([2.0, -1.0])], clients)
    probe = ad.place([torch.tensor([0.0, 0.5]), torch.tensor([1.0, -0.5])], clients)
    return {name: torch.tensor(value) for name, value in HYPER.items()}, starts, probe


@each_mode
def test_learning_rate_momentum_and_exponent(mode):
    derivative = ad.value_and_grad(federated_momentum, wrt="hyper", mode=mode)(*momentum_arguments())
    assert derivative.value == pytest.approx(0.4355625, abs=1e-15)
    gradient = [float(derivative.gradient[name]) for name in HYPER]
    assert gradient == pytest.approx([-0.128875, -0.0925, 0.09527028440793767], rel=1e-12)


def test_second_derivatives():
    """The derivative program is a program of the same kind: torch differentiates it again."""
    hyper, starts, probe = momentum_arguments()
    leaves = {name: value.requires_grad_() for name, value in hyper.items()}
    value = federated_momentum(leaves, starts, probe)
    (slope,) = torch.autograd.grad(value, leaves["lr"], create_graph=True)
    row = torch.autograd.grad(slope, list(leaves.values()))
    assert [float(entry) for entry in row] == pytest.approx([0.621125, -0.185, 0.19054056881587533], rel=1e-12)


# ---------------------------------------------------------------- many rounds


def averaging(rate, targets, probe, checkpointed=False, horizon=None):
    """Four rounds of federated averaging of one local step."""
    clients = targets.clients

    def round_(model, rate, round_idx):
        def train(w, target, rate):
            (slope,) = ad.gradient(lambda w: distance(w, target), w)
            return -rate * slope

        moved = ad.map_clients(train, ad.broadcast(model, clients), targets, ad.broadcast(rate, clients))
        return model + ad.mean(moved, weights=[1.0, 3.0])

    model = ad.unroll(round_, torch.ones(2), rate, 4, horizon=horizon, checkpointed=checkpointed)
    return ad.mean(ad.map_clients(distance, ad.broadcast(model, clients), probe))


def averaging_arguments():
    _, starts, probe = momentum_arguments()
    return torch.tensor(0.5), starts, probe


def by_hand(rate):
    """With the weighted mean ``m`` of the targets the model is ``m + (1 - rate)^4 (1 - m)``; its loss's derivative."""
    m = torch.tensor([1.5, -0.75])
    model = m + (1 - rate) ** 4 * (1 - m)
    slope = model - torch.tensor([0.5, 0.0])
    return float((slope * (-4 * (1 - rate) ** 3 * (1 - m))).sum())


@pytest.mark.parametrize("checkpointed", [False, True])
@each_mode
def test_four_rounds(mode, checkpointed):
    derivative = ad.value_and_grad(averaging, wrt="rate", mode=mode)(*averaging_arguments(), checkpointed)
    assert float(derivative.gradient) == pytest.approx(by_hand(0.5), rel=1e-12)


def test_checkpointed_rounds_are_bit_identical_and_computed_once_more():
    kept = ad.value_and_grad(averaging, wrt="rate", mode="reverse")(*averaging_arguments())
    again = ad.value_and_grad(averaging, wrt="rate", mode="reverse")(*averaging_arguments(), True)
    assert torch.equal(kept.gradient, again.gradient)
    assert (kept.traffic.rounds, again.traffic.rounds) == (10, 14)


def test_a_horizon_of_one_is_the_derivative_of_the_last_round():
    derivative = ad.value_and_grad(averaging, wrt="rate", mode="reverse")(*averaging_arguments(), False, 1)
    m, before = torch.tensor([1.5, -0.75]), 0.5**3
    model = m + before * 0.5 * (1 - m)
    expected = ((model - torch.tensor([0.5, 0.0])) * (m - (m + before * (1 - m)))).sum()
    assert float(derivative.gradient) == pytest.approx(float(expected), rel=1e-12)


def test_what_a_checkpointed_round_captures_is_refused():
    rate = torch.tensor(0.5, requires_grad=True)

    def round_(model, hyper, round_idx):
        return model * rate

    model = torch.ones(2, requires_grad=True)
    result = ad.unroll(round_, model, None, 1, checkpointed=True)
    with pytest.raises(RuntimeError, match=r"depends on differentiated tensors .* Pass them in `hyper=`"):
        result.sum().backward()


# ---------------------------------------------------------------- models


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(2, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.cell(x[:, :6].reshape(len(x), 3, 2))[0][:, -1])


class Point(nn.Module):
    """A model that is one vector, with a quadratic loss."""

    def __init__(self):
        super().__init__()
        self.point = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x[:, :3] - self.point


NETWORKS = {
    "quadratic": Point,
    "perceptron": lambda: nn.Sequential(nn.Linear(16, 2), nn.Tanh(), nn.Linear(2, 2)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 2, 3, bias=False),
        nn.BatchNorm2d(2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(8, 2),
    ),
    "recurrent": Recurrent,
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (8, 2)),
        nn.TransformerEncoderLayer(2, 1, 2, 0.0, nn.functional.softplus, batch_first=True),
        nn.Flatten(),
        nn.Linear(16, 2),
    ),
}


def network_program(make, rounds):
    """A program that trains a network in a federation and returns its loss, as a function of four hyper-parameters."""
    torch.manual_seed(0)
    network = make()
    start = {name: value.detach() for name, value in network.named_parameters()}
    names = list(start)
    velocity = {name: 0.1 * torch.randn_like(value) for name, value in start.items()}
    buffers = dict(network.named_buffers())
    clients = ad.Clients(range(2))
    inputs = [torch.randn(4, 16) for _ in clients.ids]
    data = ad.place([(x, x[:, :2].argmax(1)) for x in inputs], clients)
    sizes = ad.place([1.0, 3.0], clients)

    def loss_of(data):
        def loss(*values):
            copies = {name: buffer.clone() for name, buffer in buffers.items()}
            output = functional_call(network, {**dict(zip(names, values, strict=True)), **copies}, (data[0],))
            if make is Point:
                return 0.5 * output.square().mean()
            return nn.functional.cross_entropy(output, data[1])

        return loss

    def train(model, hyper, data, size):
        values = list(model.values())
        slopes = ad.gradient(loss_of(data), *values)
        weight = size ** hyper["exponent"]
        return [weight * hyper["client rate"] * slope for slope in slopes], weight

    def round_(state, hyper, round_idx):
        sent = {name: hyper[name] for name in ("client rate", "exponent")}
        moved = ad.map_clients(train, ad.broadcast(state[0], clients), ad.broadcast(sent, clients), data, sizes)
        steps, weight = ad.sum(moved)
        velocity = {n: hyper["momentum"] * state[1][n] + step / weight for n, step in zip(names, steps, strict=True)}
        return {n: value - hyper["server rate"] * velocity[n] for n, value in state[0].items()}, velocity

    def program(hyper):
        model, _ = ad.unroll(round_, (start, velocity), hyper, rounds)
        return ad.mean(ad.map_clients(lambda m, d: loss_of(d)(*m.values()), ad.broadcast(model, clients), data))

    return program


LEARNED = {"server rate": 0.7, "momentum": 0.6, "exponent": 0.5, "client rate": 0.4}


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_modes_agree_with_central_differences(name, rounds):
    program = network_program(NETWORKS[name], rounds)
    at = {quantity: torch.tensor(value) for quantity, value in LEARNED.items()}
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        found = {mode: ad.value_and_grad(program, "hyper", mode)(at) for mode in MODES}
        for quantity, value in LEARNED.items():
            h = 1e-5
            ahead = program({**at, quantity: torch.tensor(value + h)})
            behind = program({**at, quantity: torch.tensor(value - h)})
            difference = float(ahead - behind) / (2 * h)
            assert abs(difference) > 1e-4, "nothing would be compared"
            forward = float(found["forward"].gradient[quantity])
            assert forward == pytest.approx(difference, rel=1e-6), quantity
            for mode in MODES:
                assert float(found[mode].gradient[quantity]) == pytest.approx(forward, rel=1e-10), (quantity, mode)
        if rounds == 4 and name != "quadratic":
            return
        sheet = ad.cost(program, "hyper")(at)
    for mode in MODES:
        traffic, extra = found[mode].traffic, sheet.modes[mode]
        assert (traffic.down, traffic.up) == (sheet.down + extra.down, sheet.up + extra.up), mode
        assert traffic.rounds == sheet.rounds + extra.rounds, mode


# ---------------------------------------------------------------- what is sent

SHAPES = {
    "one number": (lambda x, c: ad.sum(ad.map_clients(lambda x, k: (k * x).sum(), ad.broadcast(x, c[0]), c[1]))),
    "as many": (lambda x, c: ad.sum(ad.map_clients(lambda x, k: k * x * x, ad.broadcast(x, c[0]), c[1])).sum()),
    "more": (
        lambda x, c: ad.sum(ad.map_clients(lambda x, k: k * torch.outer(x, x), ad.broadcast(x, c[0]), c[1])).sum()
    ),
    "two rounds": (
        lambda x, c: ad.mean(
            ad.map_clients(
                lambda y, k: y.square().sum() * k,
                ad.broadcast(ad.sum(ad.map_clients(lambda x, k: k * x, ad.broadcast(x, c[0]), c[1])), c[0]),
                c[1],
            )
        )
    ),
    "a constant, too": (
        lambda x, c: ad.sum(
            ad.map_clients(
                lambda x, y, k: (x * y).sum() * k, ad.broadcast(x, c[0]), ad.broadcast(torch.ones(4, 1), c[0]), c[1]
            )
        )
    ),
}


@each_mode
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cost_sheet_is_what_is_counted(shape, mode):
    clients = ad.Clients(range(3))
    at_clients = ad.place([1.0, 2.0, 3.0], clients)

    def program(x, data):
        return SHAPES[shape](x, (data.clients, data))

    x = torch.tensor([0.5, -1.0, 2.0])
    sheet = ad.cost(program, "x")(x, at_clients)
    counted = ad.value_and_grad(program, "x", mode)(x, at_clients).traffic
    extra = sheet.modes[mode]
    assert (counted.down, counted.up) == (sheet.down + extra.down, sheet.up + extra.up)
    assert counted.rounds == sheet.rounds + extra.rounds


def test_an_account_computes_nothing():
    clients = ad.Clients(range(3))
    calls = []

    def program(x, data):
        def local(x, size):
            calls.append(size)
            return x * size

        return ad.sum(ad.map_clients(local, ad.broadcast(x, data.clients), data)).sum()

    sheet = ad.cost(program, "x")(torch.ones(10**6), ad.place([1.0, 2.0, 3.0], clients))
    assert calls == [1.0], "one client stands for all"
    assert (sheet.down, sheet.up) == (10**6, 10**6)


def test_a_branch_on_a_tensor_has_no_account():
    clients = ad.Clients(range(2))

    def program(x, data):
        return x * 2 if ad.sum(ad.broadcast(x, clients)) > 1 else x

    with pytest.raises(ValueError, match="branches on the value of a tensor"):
        ad.cost(program, "x")(torch.tensor(1.0), ad.place([1, 2], clients))
    derivative = ad.value_and_grad(program, "x", "reverse")(torch.tensor(1.0), ad.place([1, 2], clients))
    assert float(derivative.gradient) == 2


def test_a_derivative_consists_of_the_two_primitives(monkeypatch):
    """Closure: what crosses the border in the derivative program are broadcasts and sums, as in the program."""
    seen = []
    for primitive in (Broadcast, Sum):
        original = primitive.apply

        def counted(*args, _original=original, _name=primitive.__name__):
            seen.append(_name)
            return _original(*args)

        monkeypatch.setattr(primitive, "apply", counted)
    moved = []
    original_total = ad.Clients.total
    monkeypatch.setattr(ad.Clients, "total", lambda self, rows: moved.append(1) or original_total(self, rows))
    ad.value_and_grad(federated_momentum, "hyper", "reverse")(*momentum_arguments())
    assert seen.count("Sum") == len(moved), "nothing is summed over clients in another way"
    # Forward: model, exponent, new model down; two numbers and a loss up. Backward: their transposes.
    assert seen == ["Broadcast", "Broadcast", "Sum", "Sum", "Broadcast", "Sum", *["Broadcast", "Sum"], *seen[8:]]
    assert sorted(seen[6:]) == ["Broadcast"] * 3 + ["Sum"] * 2


# ---------------------------------------------------------------- weights of the server


@each_mode
def test_a_weighted_sum_gives_the_inner_products(mode):
    clients = ad.Clients(range(3))
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])

    def program(weights, data):
        return distance(ad.weighted_sum(data, weights), torch.tensor([1.0, 1.0]))

    weights = torch.tensor([0.5, 0.25, 0.25])
    derivative = ad.value_and_grad(program, "weights", mode)(weights, ad.place(list(vectors), clients))
    # The mixture is (0.75, 0.75), so the cotangent is (-0.25, -0.25).
    assert derivative.gradient.tolist() == [-0.25, -0.5, -0.5]
    sheet = ad.cost(program, "weights")(weights, ad.place(list(vectors), clients))
    assert not sheet.sums_only
    assert sheet.down == 0


# ---------------------------------------------------------------- transforms of torch


def test_the_primitives_have_rules_for_every_transform():
    clients = ad.Clients(range(3))

    def total(x):
        return Sum.apply(Broadcast.apply(x, clients) * torch.arange(1.0, 4.0)[:, None], clients)

    x = torch.tensor([1.0, -2.0])
    assert torch.autograd.gradcheck(total, x.clone().requires_grad_(), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: total(x) ** 2, x.clone().requires_grad_())
    assert torch.equal(torch.func.jacrev(total)(x), 6 * torch.eye(2))
    assert torch.equal(torch.func.jacfwd(total)(x), 6 * torch.eye(2))
    assert torch.equal(torch.func.vmap(total)(torch.stack([x, 2 * x])), 6 * torch.stack([x, 2 * x]))
    value, tangent = torch.func.jvp(total, (x,), (torch.ones(2),))
    assert torch.equal(value, 6 * x)
    assert torch.equal(tangent, torch.full((2,), 6.0))


# ---------------------------------------------------------------- drop-outs


def lossy(policy, lost, weights=None):
    clients = ad.Clients(range(4))
    data = ad.place([1.0, 2.0, 3.0, 4.0], clients)

    def program(x, data):
        return ad.mean(ad.map_clients(lambda x, k: k * x, ad.broadcast(x, data.clients), data))

    return ad.value_and_grad(program, "x", "reverse", drop_outs=ad.DropOuts(lost, policy, weights))(
        torch.tensor(1.0), data
    )


def test_clients_that_are_gone_in_the_reverse_pass():
    """The gradient is (1 + 2 + 3 + 4) / 4; without clients 0 and 1 it is 7 / 4, of half of the weight."""
    assert float(lossy("stored", {0, 1}).gradient) == 2.5
    dropped = lossy("drop", {0, 1})
    assert float(dropped.value) == 2.5
    assert float(dropped.gradient) == 1.75
    assert dropped.traffic.missing_weight == [0.5]
    assert float(lossy("reweight", {0, 1}).gradient) == 3.5
    assert float(lossy("reweight", {0, 1}, [1, 2, 3, 4]).gradient) == pytest.approx(2.5)
    assert float(lossy("drop", lambda round_idx: {3} if round_idx == 0 else set()).gradient) == 1.5
    with pytest.raises(RuntimeError, match=r"Clients \[0, 1\] are gone in the reverse pass of round 0"):
        lossy("raise", {0, 1})
    with pytest.raises(RuntimeError, match="All clients are gone"):
        lossy("reweight", range(4))


def test_reweighting_is_unbiased_and_dropping_is_not():
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([1.0, 2.0, 3.0, 4.0])
    clients = ad.Clients(range(4))
    dropped, reweighted = [], []
    for _ in range(2000):
        lost = set((torch.rand(4, generator=generator) < 0.3).nonzero().flatten().tolist())
        if len(lost) == 4:
            continue
        for policy, found in (("drop", dropped), ("reweight", reweighted)):
            clients.drop_outs = ad.DropOuts(lost, policy)
            found.append(float(clients.without_lost(rows, 0).sum()))
    clients.drop_outs = None
    for found, expected in ((dropped, 7.0), (reweighted, 10.0)):
        values = torch.tensor(found)
        # The draws in which all are gone are left out, with a probability of 0.3^4.
        assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / math.sqrt(len(values)) + 0.06


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_refused_in_a_sentence():
    clients = ad.Clients(range(2))
    data = ad.place([1.0, 2.0], clients)
    x = torch.tensor(1.0)
    at_clients = ad.broadcast(x, clients)
    for misuse in (
        lambda: x + at_clients,
        lambda: at_clients * 2,
        lambda: torch.exp(at_clients),
        lambda: ad.broadcast(at_clients, clients),
        lambda: at_clients[0],
        lambda: list(at_clients),
    ):
        with pytest.raises(TypeError, match="A value at the clients .* with `map_clients"):
            misuse()
    with pytest.raises(TypeError, match="`map_clients` works on values at the clients, got Tensor. Send it"):
        ad.map_clients(lambda a, b: a, at_clients, x)
    with pytest.raises(TypeError, match="`sum` adds a value at the clients, got Tensor"):
        ad.sum(x)
    with pytest.raises(ValueError, match="same `Clients` object"):
        ad.map_clients(lambda a, b: a, at_clients, ad.place([1, 2], ad.Clients(range(2))))
    with pytest.raises(ValueError, match="one entry for each of the 2 clients, got 3"):
        ad.place([1, 2, 3], clients)
    with pytest.raises(ValueError, match="lacks \\[1\\]"):
        ad.place({0: 1.0}, clients)
    with pytest.raises(ValueError, match="`weights` must have the shape \\[2\\]"):
        ad.weighted_sum(at_clients, torch.ones(3))
    with pytest.raises(ValueError, match="at least one client, and each once"):
        ad.Clients([0, 0])

    def loss(x, data, n=0):
        return ad.mean(ad.map_clients(lambda x, k: x * k, ad.broadcast(x, clients), data))

    with pytest.raises(TypeError, match="`wrt` must name arguments of the program"):
        ad.value_and_grad(loss, "y")(x, data)
    with pytest.raises(TypeError, match="must hold floating-point tensors, got torch.int64"):
        ad.value_and_grad(loss, "x")(torch.tensor(1), data)
    with pytest.raises(TypeError, match="holds a value at the clients"):
        ad.value_and_grad(loss, "data")(x, data)
    with pytest.raises(ValueError, match=r"must return a scalar, got the shape \[2\]"):
        ad.value_and_grad(loss, "x", "reverse")(torch.ones(2), data)
    with pytest.raises(TypeError, match="must return a tensor at the server, got a value at the clients"):
        ad.value_and_grad(lambda x, data: data, "x", "reverse")(x, data)
    for mode in MODES:
        with pytest.raises(ValueError, match="does not depend on `wrt`"):
            ad.value_and_grad(lambda x, data: ad.sum(ad.broadcast(torch.ones(()), clients)), "x", mode)(x, data)
    with pytest.raises(ValueError, match="`mode`"):
        ad.value_and_grad(loss, "x", "sideways")
    with pytest.raises(ValueError, match="`horizon`"):
        ad.unroll(lambda s, h, t: s, x, None, 1, horizon=0)
    with pytest.raises(ValueError, match="`policy`"):
        ad.DropOuts([0], "forget")

"""FedHyper: hand-worked numbers, the clients' scheduler in both engines, and what it refuses."""

from __future__ import annotations

import math
from functools import cache

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from federations import Classifier, flat, loader, train, trainer
from lightning_fedhaw import FedAvgCallback, FederatedDataModule, FedHyperCallback
from lightning_fedhaw.aggregation.fedhyper import ClientRate, next_rate
from lightning_fedhaw.aggregation.shared_rate import SharedRate
from lightning_fedhaw.clients.lr_scale import ScaledOptimizer, ScaledSteps, initial_scale_states
from lightning_fedhaw.extending import ClientVectors, Cohort, LocalLRScale

MOVES = [[1.0, 0.0], [0.5, 0.5], [-4.0, 0.1], [-2.0, 0.0]]


def tensor(values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def make_cohort(round_idx, start, moves, sizes=(1,), rate=0.01) -> Cohort:
    count = len(moves)
    return Cohort(
        round=round_idx,
        clients=torch.arange(count),
        num_examples=torch.tensor(sizes),
        num_steps=torch.ones(count, dtype=torch.int64),
        received=torch.ones(count, dtype=torch.bool),
        start=start,
        vectors=ClientVectors(tensor(moves), start),
        learning_rates=(rate,),
    )


def play(rule, moves=MOVES, **kwargs):
    start, steps = tensor([0.0, 0.0]), []
    state = rule.init(start, torch.tensor([1]))
    for t, moved in enumerate(moves):
        step = rule.step(make_cohort(t, start, [moved], **kwargs), state, None)
        start, state = step.parameters, step.state
        steps.append(step)
    return steps


# ---------------------------------------------------------------------- the server's rate


@pytest.mark.parametrize(
    ("bounds", "alphas", "ends"),
    [
        ((1 / 3, 3.0), [1, 1.5, 1 / 3, 3], [(1, 0), (1.75, 0.75), (0.41666667, 0.78333333), (-5.58333333, 0.78333333)]),
        ((0.2, 5.0), [1, 1.5, 0.2, 5], None),
    ],
    ids=["paper", "code"],
)
def test_the_servers_rate(bounds, alphas, ends):
    steps = play(FedHyperCallback(alpha_bounds=bounds))
    assert [step.metrics["alpha"] for step in steps] == pytest.approx(alphas, abs=1e-8)
    for step, end in zip(steps, ends or [], strict=False):
        assert torch.allclose(step.parameters, tensor(end), atol=1e-8)
    # The change is kept as it came, not as it was scaled.
    assert torch.equal(steps[-1].state["delta"], -tensor(MOVES[-1]))


def test_cosines_are_shares_of_the_rate():
    steps = play(FedHyperCallback(normalize_by="norms"), moves=MOVES[:2])
    assert steps[1].metrics["alpha"] == pytest.approx(1 + math.sqrt(0.5))
    scaled = play(FedHyperCallback(normalize_by="norms"), moves=[[1e6, 0.0], [0.5e6, 0.5e6]])
    assert scaled[1].metrics["alpha"] == pytest.approx(1 + math.sqrt(0.5))


def test_weights_by_examples_or_uniform():
    for weighting, expected in (("examples", [0.25, 0.75]), ("uniform", [0.5, 0.5])):
        rule = FedHyperCallback(weighting=weighting)
        start = tensor([0.0, 0.0])
        cohort = make_cohort(0, start, [[1.0, 0.0], [0.0, 1.0]], sizes=(1, 3))
        step = rule.step(cohort, rule.init(start, torch.tensor([1, 3])), None)
        assert step.parameters.tolist() == step.weights.tolist() == expected


def test_a_product_that_is_not_finite_leaves_the_rate():
    with pytest.warns(UserWarning, match="FedHyper's product of round 1 is not finite: the rates stay"):
        steps = play(FedHyperCallback(), moves=[[1e200, 0.0], [1e200, 0.0]])
    assert steps[1].metrics["alpha"] == 1.0
    assert next_rate(tensor(1.0), tensor(float("nan")), (0.5, 2.0)).item() == 1.0


def test_the_clients_rate_by_the_server():
    # 0.01 + 0.005, then + (-2), then + 8, within [0.001, 0.1].
    moves = [[0.1, 0.0], [0.05, 0.05], [-40.0, 0.1], [-0.2, 0.0]]
    steps = play(FedHyperCallback("SL"), moves=moves)
    assert [step.metrics["beta"] for step in steps] == pytest.approx([0.01, 0.015, 0.001, 0.1])
    assert all(step.metrics["alpha"] == 1.0 for step in steps)
    lr_scale = FedHyperCallback("SL").local_lr_scale(steps[1].state, None)
    assert isinstance(lr_scale, SharedRate)
    assert lr_scale.multiple == pytest.approx(1.5)


# ---------------------------------------------------------------------- the clients' rate


def descend(x, rate, gradient, lr_scale, steps=4):
    """Plain SGD in one dimension, paced; the point and the pace's multiple after each step."""
    parameter = torch.nn.Parameter(tensor([x]))
    optimizer = torch.optim.SGD([parameter], lr=rate)
    scaled_steps = ScaledOptimizer(optimizer, [parameter])
    state = initial_scale_states(lr_scale, [({"x": parameter.detach().clone()}, steps)], [rate])
    scaled_steps.scaled_steps = ScaledSteps(lr_scale, ["x"], {name: value[0] for name, value in state.items()})
    points, multiples = [], []
    for _ in range(steps):
        parameter.grad = gradient(parameter.detach().clone())
        optimizer.step()
        points.append(parameter.item())
        multiples.append(scaled_steps.scaled_steps.state["multiple"].item())
    scaled_steps.close()
    return points, multiples


def test_the_clients_rate_saturates_on_large_gradients():
    points, multiples = descend(1.0, 0.1, lambda x: 2 * x, ClientRate({"x": tensor([0.3])}))
    assert [0.1 * m for m in multiples] == pytest.approx([0.1, 1.0, 0.01, 1.0])
    assert points == pytest.approx([0.8, -0.8, -0.784, 0.784])


def test_the_clients_rate_moves_on_small_gradients():
    points, multiples = descend(0.1, 0.05, lambda x: x, ClientRate({"x": tensor([0.02])}))
    assert [0.05 * m for m in multiples] == pytest.approx([0.05, 0.059975, 0.06890524, 0.07674638], abs=1e-8)
    assert points == pytest.approx([0.095, 0.08930238, 0.08314897, 0.07676759], abs=1e-8)


def test_the_form_of_the_authors_code():
    lr_scale = ClientRate({"x": tensor([0.02])}, normalize_by="lr")
    points, multiples = descend(0.1, 0.05, lambda x: x, lr_scale)
    assert points == pytest.approx([0.095, 0.09025, 0.08573703, 0.08144960], abs=1e-8)
    assert multiples == pytest.approx([1, 1.0001045, 1.0001349657, 1.0001628934], abs=1e-10)


@pytest.mark.parametrize("normalize_by", ["none", "norms", "lr"])
def test_a_stack_of_clients_is_as_many_clients(normalize_by):
    g = torch.Generator().manual_seed(0)
    shapes = {"a": (2, 3), "b": (), "c": (4,)}
    delta = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    lr_scale = ClientRate(delta, normalize_by=normalize_by, hyper_lr=0.01, cohort_size=2)
    starts = [{n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()} for _ in range(3)]
    together = initial_scale_states(lr_scale, [(start, 3 + i) for i, start in enumerate(starts)], [0.1])
    alone = [initial_scale_states(lr_scale, [(start, 3 + i)], [0.1]) for i, start in enumerate(starts)]
    for _ in range(3):
        gradients = {n: torch.randn(3, *s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
        factor, together = lr_scale.factor(gradients, together)
        for i in range(3):
            own = {n: v[0] for n, v in alone[i].items()}
            one, after = lr_scale.factor({n: v[i] for n, v in gradients.items()}, own)
            alone[i] = {n: v[None] for n, v in after.items()}
            assert torch.allclose(one, factor[i], atol=1e-12)
            assert after.keys() == together.keys()
            for name, value in after.items():
                assert torch.allclose(value, together[name][i], atol=1e-12)
    assert (factor != 1).all()


def adam(p):
    return torch.optim.Adam(p, lr=0.01)


def momentum(p):
    return torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3)


@cache
def by_fedavg(optimizer):
    return flat(train(Classifier(optimizer), local_epochs=2, gradient_clip_val=1.0)[1])


@pytest.mark.parametrize("adapt", ["SL", "CL", "G+SL", "G+CL"])
@pytest.mark.parametrize("optimizer", [None, adam, momentum], ids=["SGD", "Adam", "momentum"])
def test_both_engines_give_the_same(adapt, optimizer):
    def fit(engine):
        rule = FedHyperCallback(adapt, normalize_by="norms", hyper_lr=0.3)
        return flat(train(Classifier(optimizer), rule=rule, engine=engine, local_epochs=2, gradient_clip_val=1.0)[1])

    sequential, vectorized = fit("sequential"), fit("vectorized")
    assert torch.allclose(sequential, vectorized, atol=2e-5)
    assert (sequential - by_fedavg(optimizer)).abs().max() > 1e-3


class Twice(FedAvgCallback):
    """All clients at twice their rate."""

    def local_lr_scale(self, state, layout):
        return SharedRate(2.0)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ids=lambda make: make.__name__)
def test_a_factor_is_a_learning_rate(make, engine):
    ours = train(Classifier(lambda p: make(p, lr=0.02)), rule=Twice(), engine=engine)[1]
    theirs = train(Classifier(lambda p: make(p, lr=0.04)), engine="sequential")[1]
    assert torch.allclose(flat(ours), flat(theirs), atol=2e-6)


def test_a_factor_of_one_changes_no_bit():
    class Once(FedAvgCallback):
        def local_lr_scale(self, state, layout):
            return SharedRate(1.0)

    kept = {"optimizer_state": "kept"}
    assert torch.equal(
        flat(train(Classifier(momentum), rule=Once(), **kept)[1]), flat(train(Classifier(momentum), **kept)[1])
    )


def test_an_optimizer_is_left_alone_afterwards():
    runner, _ = train(rule=FedHyperCallback("CL"))
    (optimizer,) = runner.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_steps_that_a_client_is_going_to_make():
    seen = []

    class Watching(LocalLRScale):
        def begin(self, start, num_steps, rates):
            seen.append(num_steps)
            return {"one": torch.ones(())}

        def factor(self, gradients, state):
            return state["one"], dict(state)

    class Rule(FedAvgCallback):
        def local_lr_scale(self, state, layout):
            return Watching()

    made = []

    class Counter(pl.Callback):
        def on_client_end(self, trainer, pl_module, update):
            made.append(update.num_steps)

    for engine in ("sequential", "vectorized"):
        for plan in ({"local_epochs": 3}, {"local_steps": 5}, {"limit_train_batches": 2}):
            train(rule=Rule(), callbacks=[Counter()], engine=engine, rounds=1, **plan)
    train(rule=Rule(), callbacks=[Counter()], rounds=1, local_epochs=2, accumulate_grad_batches=3)
    assert seen
    assert sorted(seen) == sorted(made)


def test_manual_optimization_is_paced_too():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()

    rule = {"adapt": "CL", "normalize_by": "norms", "hyper_lr": 0.3}
    manual = train(Manual(), rule=FedHyperCallback(**rule))[1]
    assert torch.allclose(flat(manual), flat(train(rule=FedHyperCallback(**rule))[1]), atol=1e-6)


def test_bounds_of_one_are_fedavg():
    for adapt in ("G", "G+SL", "G+CL"):
        rule = FedHyperCallback(adapt, alpha_bounds=(1, 1), beta_bounds=(1, 1))
        assert torch.allclose(flat(train(rule=rule)[1]), flat(train()[1]), atol=1e-6)


def test_resumed_it_goes_on_with_the_same_bits(tmp_path):
    def fit(rounds, **kwargs):
        module = Classifier()
        runner = trainer(rounds=rounds, rule=FedHyperCallback("G+CL", normalize_by="norms", hyper_lr=0.3))
        runner.fit(module, loader(), **kwargs)
        return runner, module

    whole = fit(4)[1]
    fit(2)[0].save_checkpoint(tmp_path / "half.ckpt")
    assert torch.equal(flat(fit(4, ckpt_path=tmp_path / "half.ckpt")[1]), flat(whole))


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"adapt": "SL+CL"}, "SL and CL both set the clients' rate, so they do not combine. Use 'G[+]SL' or 'G[+]CL'"),
        ({"adapt": "G+SL+CL"}, "do not combine"),
        ({"adapt": "X"}, "`adapt` must be one of 'G', 'SL', 'CL', 'G[+]SL', 'G[+]CL', got 'X'"),
        ({"normalize_by": "sin"}, "`normalize_by` must be one of"),
        ({"weighting": "steps"}, "`weighting` must be one of"),
        ({"alpha_bounds": (2.0, 3.0)}, "`alpha_bounds` must be two positive numbers around 1"),
        ({"beta_bounds": 10.0}, "`beta_bounds` must be two positive numbers around 1"),
        ({"hyper_lr": -1.0}, "`hyper_lr` must be a finite number of at least 0, got -1.0"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        FedHyperCallback(**arguments)


def test_a_local_rate_that_is_not_one_number_is_refused():
    def two(p):
        first, *rest = p
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.2}])

    with pytest.raises(ValueError, match=r"`adapt`='CL' learns the clients' one rate, and Classifier has 1 optimizers"):
        train(Classifier(two), rule=FedHyperCallback("CL"))
    train(Classifier(two), rule=FedHyperCallback("G"), rounds=1)


def test_the_data_module_door():
    runner = trainer(rounds=2, rule=FedHyperCallback("G+CL"), num_clients=None, alpha=None)
    runner.fit(Classifier(), FederatedDataModule(loader().dataset, num_clients=3, batch_size=8))
    assert set(runner.federation_summary) >= {"alpha", "beta"}

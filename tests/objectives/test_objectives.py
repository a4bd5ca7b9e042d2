"""FedProx, FedDyn, SCAFFOLD, FedNova: check numbers worked out from the published equations, and what each promises."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from federations import Classifier, flat, loader, momentum, samples, train, trainer
from lightning_fedhaw import (
    ErasureChannel,
    FedAvgCallback,
    FedAvgMCallback,
    FedDynCallback,
    FederatedCallback,
    FedHAWCallback,
    FedHyperCallback,
    FedNovaCallback,
    FedOptCallback,
    FedProx,
    IndexPartitioner,
    ScaffoldCallback,
)
from lightning_fedhaw.extending import Channel, ClientObjective
from lightning_fedhaw.federation.full_gradient import FullGradient
from lightning_fedhaw.objectives import MOON, FedDynObjective, FedNTD, ScaffoldObjective
from resuming import COMBINATIONS, check_resume, rotated

# ---------------------------------------------------------------------- quadratics


class Quadratic(pl.LightningModule):
    """``h (w - c)^2 / 2`` per coordinate, of which a sample is one; it makes no more steps than the sample says."""

    def __init__(self, size: int = 1, lr: float = 0.1, **options: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.lr, self.options = lr, options

    def training_step(self, batch, batch_idx):
        h, c, steps = batch
        return 0.5 * (h * (self.w - c).square()).sum(1).mean() if batch_idx < steps[0] else None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, **self.options)


class Smooth(Quadratic):
    """One that looks at no number."""

    def training_step(self, batch, batch_idx):
        return 0.5 * (batch[0] * (self.w - batch[1]).square()).sum(1).mean()


class Path(FederatedCallback):
    """Where everybody was."""

    def __init__(self) -> None:
        self.ends, self.models = [], []

    def on_client_end(self, trainer, pl_module, update):
        start = trainer.fit_loop.federation.server.parameters()
        self.ends.append((start + update.displacement).tolist())

    def on_round_end(self, trainer, pl_module, report):
        self.models.append(pl_module.w.detach().tolist())


def quadratics(curvatures, optima, steps):
    """One client each, with as many equal samples as the longest makes steps."""
    h, c = (torch.as_tensor(v, dtype=torch.float64).reshape(len(steps), -1) for v in (curvatures, optima))
    each = max(steps)
    rows = [v.repeat_interleave(each, 0) for v in (h, c, torch.tensor(steps))]
    own = [list(range(k * each, (k + 1) * each)) for k in range(len(steps))]
    return DataLoader(TensorDataset(*rows), batch_size=1), IndexPartitioner(own)


def descend(
    rule,
    objectives=(),
    rounds=1,
    steps=(2, 5),
    curvatures=(1.0, 3.0),
    optima=(1.0, -1.0),
    lr=0.1,
    kind=Quadratic,
    **options,
):
    """Rounds of the two clients of the check numbers, from 0."""
    data, partitioner = quadratics(curvatures, optima, steps)
    path = Path()
    module = kind(torch.as_tensor(optima).reshape(len(steps), -1).shape[1], lr, **options.pop("sgd", {}))
    runner = trainer(
        rounds=rounds,
        rule=rule,
        callbacks=[path, *objectives],
        num_clients=len(steps),
        alpha=None,
        partitioner=partitioner,
        precision="64-true",
        client_eval=False,
        **options,
    )
    runner.fit(module, data)
    return path


def one(values):
    """The numbers of a path in one dimension."""
    return [value[0] for value in values]


close = pytest.approx


def near(value):
    return pytest.approx(value, abs=1e-7)


def test_fedavg_and_fednova():
    path = descend(FedAvgCallback())
    assert one(path.ends) == near([0.19, -0.83193])
    assert one(path.models) == near([-0.32096500])
    assert one(descend(FedAvgCallback(), rounds=35).models)[-1] == near(-0.62815457)
    assert one(descend(FedNovaCallback()).models) == near([-0.12492550])
    assert one(descend(FedNovaCallback(), rounds=35).models)[-1] == near(-0.27310568)


def test_fedprox():
    path = descend(FedAvgCallback(), [FedProx(mu=1.0)])
    assert one(path.ends) == near([0.18, -0.69168])
    assert one(path.models) == near([-0.25584])
    assert one(descend(FedAvgCallback(), [FedProx(mu=1.0)], rounds=35).models)[-1] == near(-0.58700441)
    exact = descend(FedAvgCallback(), [FedProx(mu=1.0)], rounds=20, steps=(18, 18), lr=1 / 3)
    assert one(exact.models)[-1] == near(-0.2)


@pytest.mark.parametrize("make", [ScaffoldCallback, lambda: FedAvgCallback("uniform")], ids=["rule", "objective"])
def test_scaffold(make):
    rule = make()
    objectives = [] if rule.objectives else [ScaffoldObjective()]
    (objective,) = (*rule.objectives, *objectives)

    def controls():
        return [s["w"].item() for s in objective.state_dict()["clients"].values()], objective.mean["w"].item()

    path = descend(rule, objectives)
    assert one(path.models) == near([-0.32096500])
    assert controls()[0] == close([-0.95, 1.66386])
    assert controls()[1] == close(0.35693)
    path = descend(rule, objectives, rounds=2)
    assert one(path.ends)[2:] == near([-0.31829835, -0.52344983])
    assert one(path.models)[1] == near(-0.42087409)
    assert controls()[0] == near([-1.32026325, 1.71189966])
    assert controls()[1] == near(0.19581820)
    assert one(descend(rule, objectives, rounds=35).models)[-1] == near(-0.5)


def test_scaffold_with_full_gradients():
    rule = ScaffoldCallback("I")
    descend(rule, steps=(5, 5))
    states = rule.objectives[0].state_dict()
    assert [s["w"].item() for s in states["clients"].values()] == close([-1.0, 3.0])
    assert states["mean"]["w"].item() == close(1.0)
    assert one(descend(ScaffoldCallback("I"), rounds=35, steps=(5, 5)).models)[-1] == near(-0.5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_scaffold_finds_the_average_gradient_whatever_the_local_optimizer(nesterov):
    """On a linear loss every gradient is the same: so are the controls, with momentum and proximal pull and without."""
    for sgd in ({}, {"momentum": 0.9, "nesterov": nesterov}):
        for extra in ([], [FedProx(mu=0.5)]):
            objective = ScaffoldObjective()
            descend(
                FedAvgCallback("uniform"), [objective, *extra], 3, curvatures=(1e-9, 1e-9), optima=(-2e9, 1e9), sgd=sgd
            )
            states = objective.state_dict()
            assert [s["w"].item() for s in states["clients"].values()] == close([2.0, -1.0], rel=1e-6)
            assert states["mean"]["w"].item() == close(0.5, rel=1e-6)


class Deaf(Channel):
    """Client 1 hears nothing in rounds 1 and 2, and trains what it received last."""

    def __init__(self):
        super().__init__(link="downlink", fallback="reuse_model")

    def outage(self, round_idx, clients, seed):
        return torch.tensor([client == 1 and round_idx in (1, 2) for client in clients])


def test_scaffolds_control_is_as_old_as_the_model_it_came_with():
    w, c, own, received, models = 0.0, 0.0, [0.0, 0.0], [(0.0, 0.0)] * 2, []
    for round_idx in range(4):
        moved, changed = [], []
        for k, (h, optimum, steps) in enumerate([(1.0, 1.0, 2), (3.0, -1.0, 5)]):
            if not (k == 1 and round_idx in (1, 2)):
                received[k] = (w, c)
            y, control = received[k]
            for _ in range(steps):
                y -= 0.1 * (h * (y - optimum) - own[k] + control)
            new = own[k] - control + (received[k][0] - y) / (0.1 * steps)
            moved.append(y - received[k][0])
            changed.append(new - own[k])
            own[k] = new
        w, c = w + sum(moved) / 2, c + sum(changed) / 2
        models.append(w)
    assert one(descend(ScaffoldCallback(), [Deaf()], rounds=4).models) == near(models)
    smooth = {"kind": Smooth, "steps": (5, 5), "rounds": 4}
    both = [descend(ScaffoldCallback(), [Deaf()], engine=each, **smooth) for each in ("sequential", "vectorized")]
    assert one(both[1].models) == near(one(both[0].models))


def test_scaffold_goes_on_with_old_controls():
    def run(rounds, ckpt_path=None):
        module, deaf = Classifier(), ErasureChannel(0.5, link="downlink", fallback="reuse_model")
        runner = trainer(rounds=rounds, rule=ScaffoldCallback(), callbacks=[deaf], seed=1, client_eval=False)
        runner.fit(module, loader(), ckpt_path=ckpt_path)
        runner.save_checkpoint("stopped.ckpt")
        return module

    straight = run(5)
    run(3)
    assert torch.equal(flat(straight), flat(run(5, "stopped.ckpt")))


def test_scaffold_keeps_a_control_whose_rate_is_zero():
    """A cosine ends at a rate of zero: nobody moves in that round, and nothing is divided by it."""

    class Cosine(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)]

    def controls(rounds):
        rule, module = ScaffoldCallback(), Cosine()
        trainer(rule=rule, rounds=rounds).fit(module, loader())
        (scaffold,) = rule.objectives
        return flat(module), scaffold.mean, scaffold.state_dict()["clients"]

    (before, mean, own), (after, later_mean, later_own) = controls(2), controls(3)
    assert torch.equal(before, after)
    for name, value in mean.items():
        torch.testing.assert_close(later_mean[name], value, atol=1e-6, rtol=0)
        for client, control in own.items():
            torch.testing.assert_close(later_own[client][name], control[name], atol=1e-6, rtol=0)


def test_scaffold_reads_each_groups_rate_as_scheduled():
    class Two(Quadratic):
        def __init__(self):
            super().__init__(2)
            self.v = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def training_step(self, batch, batch_idx):
            return (batch[0] * (self.w + 3 * self.v)).sum(1).mean()

        def configure_optimizers(self):
            groups = [{"params": [self.v], "lr": 0.3, "momentum": 0.5}, {"params": [self.w]}]
            optimizer = torch.optim.SGD(groups, lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]

    data, partitioner = quadratics([[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0]] * 2, (2, 2))
    objective = ScaffoldObjective()
    options = {"num_clients": 2, "alpha": None, "partitioner": partitioner, "precision": "64-true"}
    trainer(rounds=3, callbacks=[objective], client_eval=False, **options).fit(Two(), data)
    kept = objective.state_dict()["clients"]
    assert kept[1]["w"].tolist() == close([3.0, 4.0])
    assert kept[1]["v"].tolist() == close([9.0, 12.0])
    assert objective.mean["v"].tolist() == close([6.0, 9.0])


def test_feddyn():
    exact = {"steps": (25, 25), "lr": 0.4}

    def duals(rule):
        return [s["w"].item() for s in rule.objectives[0].state_dict()["clients"].values()]

    rule = FedDynCallback(regularization=0.5)
    path = descend(rule, **exact)
    assert one(path.ends) == near([0.66666667, -0.85714286])
    assert duals(rule) == near([-0.33333333, 0.42857143])
    assert rule.state["h"].item() == near(0.04761905)
    assert one(path.models) == near([-0.19047619])
    assert one(descend(FedDynCallback(regularization=0.5), rounds=2, **exact).models)[1] == near(-0.28571429)
    assert one(descend(rule, rounds=45, **exact).models)[-1] == close(-0.5, abs=1e-5)
    assert duals(rule) == close([-1.5, 1.5], abs=1e-5)
    assert rule.state["h"].item() == close(0.0, abs=1e-5)


def test_feddyn_without_the_square_pulls_with_constant_length():
    w, start = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, {"a": torch.zeros(1), "b": torch.zeros(1)}
    objective = FedDynObjective(regularization=0.5, penalty="norm")
    dual = {"a": torch.tensor([1.0]), "b": torch.zeros(1)}
    found = objective.gradient(w, start, dual)
    assert [v.item() for v in found.values()] == close([0.25 * 0.6 - 1, 0.25 * 0.8])
    assert [v.item() for v in objective.gradient(start, start, dual).values()] == [-1.0, 0.0]
    assert objective.end_client(dual, start, w, 1)["a"].item() == close(1 - 0.5 * 3)
    assert objective.proximal == 0


DRIFT = torch.Generator().manual_seed(4)
HESSIANS = torch.rand(6, 10, generator=DRIFT, dtype=torch.float64) * 3 + 0.2
OPTIMA = torch.randn(6, 10, generator=DRIFT, dtype=torch.float64) * 2
OPTIMUM = (HESSIANS * OPTIMA).sum(0) / HESSIANS.sum(0)


def test_scaffold_and_feddyn_reach_the_optimum_that_fedavg_misses():
    def missed(rule, objectives=(), rounds=40, **kwargs):
        data = {"curvatures": HESSIANS, "optima": OPTIMA, "steps": (8,) * 6, **kwargs}
        path = descend(rule, objectives, rounds, lr=0.2, kind=Smooth, engine="vectorized", **data)
        return (torch.tensor(path.models[-1]) - OPTIMUM).norm().item() / OPTIMUM.norm().item()

    assert missed(FedAvgCallback("uniform"), rounds=15) > 0.05
    assert missed(FedAvgCallback("uniform"), [FedProx(0.5)], rounds=15) > 0.05
    assert missed(ScaffoldCallback()) < 1e-5
    assert missed(ScaffoldCallback("I")) < 1e-5
    assert missed(FedDynCallback(regularization=0.5)) < 1e-2
    assert missed(ScaffoldCallback(), clients_per_round=3, rounds=80) < 0.02
    assert missed(FedAvgCallback("uniform"), clients_per_round=3, rounds=15) > 0.05


# ---------------------------------------------------------------------- in any federation


class SumOfSquares(ClientObjective):
    """FedProx once more, to be differentiated."""

    def penalty(self, parameters, start, state):
        return 0.05 * sum((p - start[name]).square().sum() for name, p in parameters.items())


OBJECTIVES = {
    "FedProx": lambda: FedProx(0.1),
    "FedDyn": lambda: FedDynObjective(0.1),
    "FedDyn norm": lambda: FedDynObjective(0.1, penalty="norm"),
    "SCAFFOLD": ScaffoldObjective,
    "SCAFFOLD I": lambda: ScaffoldObjective("I"),
}
RESUMED = {**OBJECTIVES, "MOON": lambda: MOON("net.0"), "FedNTD": FedNTD}
every_objective = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES.keys())


@pytest.mark.parametrize(
    ("name", "engine", "precision"),
    sorted({*rotated(RESUMED), *(("SCAFFOLD", *combination) for combination in COMBINATIONS)}),
)
def test_a_run_that_is_resumed_gives_the_bits_of_one_that_was_not(name, engine, precision):
    check_resume(lambda: [FedAvgCallback(), RESUMED[name]()], loader(60), engine=engine, precision=precision)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1e9}], ids=["plain step", "automatic step"])
def test_a_closed_gradient_is_that_of_the_term(engine, options):
    for optimizer in (None, momentum):
        _, closed = train(Classifier(optimizer), callbacks=[FedProx(0.1)], engine=engine, **options)
        _, differentiated = train(Classifier(optimizer), callbacks=[SumOfSquares()], engine=engine, **options)
        _, plain = train(Classifier(optimizer), engine=engine, **options)
        assert torch.allclose(flat(closed), flat(differentiated), atol=1e-6)
        assert not torch.allclose(flat(closed), flat(plain), atol=1e-4)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("objective", [FedProx(0), FedDynObjective(0)], ids=["FedProx", "FedDyn"])
def test_a_factor_of_zero_is_bit_identical_to_no_objective(objective, engine):
    for optimizer in (None, momentum):
        _, without = train(Classifier(optimizer), engine=engine)
        _, with_it = train(Classifier(optimizer), callbacks=[objective], engine=engine)
        assert torch.equal(flat(without), flat(with_it))


def test_scaffold_begins_as_fedavg_to_the_last_bit():
    _, without = train(rounds=1, rule=FedAvgCallback("uniform"))
    _, objective = train(rounds=1, rule=FedAvgCallback("uniform"), callbacks=[ScaffoldObjective()])
    _, rule = train(rounds=1, rule=ScaffoldCallback())
    assert torch.equal(flat(without), flat(objective))
    assert torch.equal(flat(without), flat(rule))
    _, half = train(rounds=1, rule=ScaffoldCallback(server_lr=0.5))
    assert torch.allclose(flat(half), (flat(rule) + flat(Classifier())) / 2, atol=1e-7)


@every_objective
@pytest.mark.parametrize("rule", [FedAvgCallback, FedHAWCallback, FedAvgMCallback, FedNovaCallback, FedHyperCallback])
def test_any_rule(make, rule):
    _, module = train(rule=rule(), callbacks=[make()], rounds=3)
    _, without = train(rule=rule(), rounds=3)
    assert torch.isfinite(flat(module)).all()
    assert not torch.equal(flat(module), flat(without))


@every_objective
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(make, precision):
    for engine in ("sequential", "vectorized"):
        _, module = train(callbacks=[make()], precision=precision, engine=engine)
        assert torch.isfinite(flat(module)).all()


def test_layers_of_half_precision_in_a_plain_step():
    class Halves(Classifier):
        def __init__(self):
            super().__init__()
            self.net[-1].to(torch.bfloat16)

        def training_step(self, batch, batch_idx):
            hidden = self.net[:-1](batch[0])
            return nn.functional.cross_entropy(self.net[-1](hidden.bfloat16()).float(), batch[1])

    _, module = train(Halves(), callbacks=[FedProx(0.1), ScaffoldObjective()], client_eval=False)
    assert torch.isfinite(flat(module)).all()


class Silent(Channel):
    """Loses client 1's updates."""

    def outage(self, round_idx, clients, seed):
        return torch.tensor([client == 1 for client in clients])


class Fails(Classifier):
    """Client 2 returns NaN."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        mine = samples(40).tensors[0][20:30]
        return loss * float("nan") if (batch[0][:, None] == mine).all(-1).any() else loss


@pytest.mark.filterwarnings("ignore:Client 2 returned non-finite")
@pytest.mark.parametrize(
    "make",
    [FedDynObjective, ScaffoldObjective, lambda: ScaffoldObjective("I")],
    ids=["FedDyn", "SCAFFOLD", "SCAFFOLD I"],
)
def test_who_is_not_heard_moves_nothing(make):
    own = IndexPartitioner([list(range(10 * k, 10 * k + 10)) for k in range(4)])
    objective = make()
    options = {"alpha": None, "partitioner": own, "client_eval": False}
    train(Fails(), data=loader(40), rule=FedAvgCallback("uniform"), callbacks=[objective, Silent()], **options)
    states = objective.state_dict()
    assert sorted(states["clients"]) == [0, 3]
    if objective.shares_state:
        for name, mean in states["mean"].items():
            assert torch.allclose(mean, sum(s[name] for s in states["clients"].values()) / 4, atol=1e-7)


def test_a_control_that_is_not_finite_is_not_heard(monkeypatch):
    own = IndexPartitioner([list(range(10 * k, 10 * k + 10)) for k in range(4)])
    rule = ScaffoldCallback("I")
    runner = trainer(rule=rule, alpha=None, partitioner=own, client_eval=False)
    found = FullGradient.compute

    def spoilt(self, client, start):
        return found(self, client, start) * (float("inf") if client == 2 else 1)

    monkeypatch.setattr(FullGradient, "compute", spoilt)
    with pytest.warns(UserWarning, match="Client 2 returned non-finite states of client objectives"):
        runner.fit(Classifier(), loader(40))
    assert sorted(rule.objectives[0].state_dict()["clients"]) == [0, 1, 3]
    assert all(torch.isfinite(value).all() for value in rule.objectives[0].mean.values())


def test_what_is_sent_is_counted():
    plain = train(callbacks=[FedProx()])[0].federation_summary
    twice = train(rule=ScaffoldCallback())[0].federation_summary
    assert twice["bytes_down"] == 2 * plain["bytes_down"]
    assert twice["bytes_up"] == 2 * plain["bytes_up"]


def test_full_gradients_leave_the_module_and_the_log_alone():
    class Draws(Classifier):
        def __init__(self):
            super().__init__(norm=True, dropout=0.3)

    a, first = train(Draws(), rule=FedAvgCallback("uniform"), rounds=1, data=loader(drop_last=True))
    b, second = train(Draws(), rule=ScaffoldCallback("I"), rounds=1, data=loader(drop_last=True))
    assert torch.equal(flat(first), flat(second))
    assert a.callback_metrics["train_loss"] == b.callback_metrics["train_loss"]


@pytest.mark.parametrize("rule", [ScaffoldCallback, FedDynCallback, lambda: FedOptCallback(rule=ScaffoldCallback())])
def test_what_a_rule_brings_along_is_in_its_checkpoint(rule):
    def run(rounds, ckpt_path=None):
        module = Classifier()
        runner = trainer(rounds=rounds, rule=rule(), clients_per_round=2, seed=1)
        runner.fit(module, loader(), ckpt_path=ckpt_path)
        runner.save_checkpoint("stopped.ckpt")
        return module

    straight = run(5)
    run(2)
    assert torch.equal(flat(straight), flat(run(5, "stopped.ckpt")))


def test_a_rule_serves_a_second_run_as_the_first():
    rule = ScaffoldCallback()
    models = [train(rule=rule)[1] for _ in range(2)]
    assert torch.equal(flat(models[0]), flat(models[1]))


def test_fednova_finds_proximal_terms_by_itself():
    rule = FedNovaCallback()
    _, auto = train(rule=rule, callbacks=[FedProx(1.0)], alpha=0.3)
    assert rule.proximal == 1.0
    _, said = train(rule=FedNovaCallback(proximal=1.0), callbacks=[FedProx(1.0)], alpha=0.3)
    assert torch.equal(flat(auto), flat(said))
    _, outer = train(rule=FedOptCallback(rule=FedNovaCallback()), callbacks=[FedProx(1.0)], alpha=0.3)
    assert torch.allclose(flat(auto), flat(outer), atol=1e-6)
    train(rule=rule)
    assert rule.proximal == 0


def test_weights_by_batches():
    own = IndexPartitioner([list(range(17)), list(range(17, 25))])
    seen = []

    class Watches(FedAvgCallback):
        def step(self, cohort, state, server):
            step = super().step(cohort, state, server)
            seen.append(step.weights.tolist())
            return step

    options = {"alpha": None, "partitioner": own, "num_clients": 2, "local_epochs": 2, "client_eval": False}
    train(data=loader(25), rule=Watches("batches"), rounds=1, **options)
    train(data=loader(25), rule=Watches("batches"), rounds=1, callbacks=[Silent()], **options)
    train(data=loader(25), rule=Watches("batches"), rounds=1, storage="device", **options)
    assert seen == [[0.75, 0.25]] * 3


# ---------------------------------------------------------------------- what is refused


def test_settings_are_checked():
    with pytest.raises(ValueError, match="`mu` must be a finite number of at least 0, got -1"):
        FedProx(mu=-1)
    with pytest.raises(ValueError, match="`mu` must be a finite number of at least 0, got True"):
        FedProx(mu=True)
    with pytest.raises(ValueError, match="`regularization` must be a finite number of at least 0, got inf"):
        FedDynObjective(regularization=float("inf"))
    with pytest.raises(
        ValueError, match="`regularization` must be a finite number above 0, got 0.* The server divides by it"
    ):
        FedDynCallback(regularization=0)
    with pytest.raises(ValueError, match="`penalty` must be one of 'square', 'norm', got 'l2'"):
        FedDynObjective(penalty="l2")
    with pytest.raises(ValueError, match="`option` must be one of 'II', 'I', got 'III'"):
        ScaffoldObjective("III")
    with pytest.raises(ValueError, match="`server_lr` must be a finite number of at least 0, got -1"):
        ScaffoldCallback(server_lr=-1)


def test_scaffold_needs_to_know_how_far_a_client_goes():
    with pytest.raises(ValueError, match=r"SCAFFOLD must know .* `configure_optimizers` gave Adam.*`option=\"I\"`"):
        train(Classifier(lambda p: torch.optim.Adam(p, lr=0.01)), rule=ScaffoldCallback())
    train(Classifier(lambda p: torch.optim.Adam(p, lr=0.01)), rule=ScaffoldCallback("I"), rounds=1)
    with pytest.raises(ValueError, match='SCAFFOLD needs momentum .*`optimizer_state="fresh"`'):
        train(Classifier(momentum), callbacks=[ScaffoldObjective()], optimizer_state="kept")
    with pytest.raises(ValueError, match="`FedHyperCallback` changes the clients' learning rates within a round"):
        train(rule=FedHyperCallback("G+SL"), callbacks=[ScaffoldObjective()])


def test_the_same_objective_twice():
    with pytest.raises(
        ValueError, match="has the client objective ScaffoldObjective 2 times, including those that come with"
    ):
        trainer(rule=ScaffoldCallback(), callbacks=[ScaffoldObjective()])
    with pytest.raises(ValueError, match="FedProx 2 times, .* distinguish them by `name=`"):
        trainer(callbacks=[FedProx(0.1), FedProx(0.2)])
    trainer(callbacks=[FedProx(0.1), FedProx(0.2, name="more")])
    with pytest.raises(NotImplementedError, match="`ClientObjective` must implement `penalty` or `gradient`"):
        train(callbacks=[ClientObjective()])


def test_rules_that_bring_objectives_need_automatic_optimization():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match=r"Client objectives \(ScaffoldObjective\).*automatic_optimization=False"):
        train(Manual(), rule=ScaffoldCallback())

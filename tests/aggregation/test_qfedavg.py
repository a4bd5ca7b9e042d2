"""q-FedAvg: numbers worked by hand from the paper, and the losses and logged values that a rule receives."""

from __future__ import annotations

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from federations import QUIET, Classifier, flat, loader, trainer
from lightning_fedhaw import FedAvgCallback, FederatedTrainer, FedOptCallback, IndexPartitioner, QFedAvgCallback
from lightning_fedhaw.extending import AggregationRule, Channel, ClientVectors, Cohort, ParameterLayout, RuleOutput
from lightning_fedhaw.server import Server

# Counting calls in a buffer is what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:Each client changed")

SERVER = Server(nn.Linear(1, 1).double(), ParameterLayout.of(nn.Linear(1, 1).double()))
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


def cohort(losses=(1.0, 4.0), rates=(0.5, 0.5), received=(True, True)):
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    displacements = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    return Cohort(
        round=0,
        clients=torch.arange(2),
        num_examples=torch.tensor([10, 30]),
        num_steps=torch.ones(2, dtype=torch.int64),
        received=torch.tensor(received),
        start=start,
        vectors=ClientVectors(displacements, start),
        learning_rates=rates,
        initial_losses=torch.tensor(losses, dtype=torch.float64),
    )


def test_the_step_worked_by_hand():
    # L = 2, u = (-2, 0), (0, -4), F u = (-2, 0), (0, -16); h = 4 + 2 = 6 and 16 + 8 = 24; the step is -sum F u / 30.
    step = QFedAvgCallback(q=1.0).step(cohort(), {}, SERVER)
    torch.testing.assert_close(step.parameters, torch.tensor([1 + 2 / 30, -2 + 16 / 30], dtype=torch.float64))
    assert step.weights.tolist() == [0.2, 0.8]
    assert step.metrics == {"server_step": pytest.approx(2 * 5 / 30)}
    # q = 2: F^2 u = (-2, 0), (0, -64); h = 2 * 1 * 4 + 2 = 10 and 2 * 4 * 16 + 2 * 16 = 160.
    step = QFedAvgCallback(q=2.0).step(cohort(), {}, SERVER)
    torch.testing.assert_close(step.parameters, torch.tensor([1 + 2 / 170, -2 + 64 / 170], dtype=torch.float64))
    # L = 1 by hand, q = 1: F u = (-1, 0), (0, -8); h = 1 + 1 = 2 and 4 + 4 = 8.
    step = QFedAvgCallback(lipschitz=1.0).step(cohort(rates=()), {}, SERVER)
    torch.testing.assert_close(step.parameters, torch.tensor([1.1, -2 + 0.8], dtype=torch.float64))


def test_without_fairness_it_is_the_mean():
    step = QFedAvgCallback(q=0).step(cohort(losses=(0.0, 7.0)), {}, SERVER)
    torch.testing.assert_close(step.parameters, torch.tensor([1.5, -1.0], dtype=torch.float64))


def test_a_substitute_has_no_weight():
    # q = 1 of client 0 alone: -F u / h = 2 / 6.
    step = QFedAvgCallback().step(cohort(losses=(1.0, float("nan")), received=(True, False)), {}, SERVER)
    torch.testing.assert_close(step.parameters, torch.tensor([1 + 2 / 6, -2.0], dtype=torch.float64))
    assert step.weights.tolist() == [1.0, 0.0]
    step = QFedAvgCallback().step(cohort(losses=(float("nan"),) * 2, received=(False, False)), {}, SERVER)
    assert step.parameters.tolist() == [1.0, -2.0]
    assert step.weights.tolist() == [0.25, 0.75]


def test_losses_near_zero_are_finite():
    for q in (0.5, 1.0, 3.0):
        step = QFedAvgCallback(q=q).step(cohort(losses=(0.0, 0.0)), {}, SERVER)
        assert torch.isfinite(step.parameters).all()


def test_what_is_refused():
    with pytest.raises(ValueError, match="powers of the clients' losses, .* not negative, got -1.0 for client 1"):
        QFedAvgCallback().step(cohort(losses=(1.0, -1.0)), {}, SERVER)
    with pytest.raises(ValueError, match=r"q-FedAvg needs one local learning rate .* \[0.1, 0.5\]. .* `lipschitz="):
        QFedAvgCallback().step(cohort(rates=(0.5, 0.1)), {}, SERVER)
    with pytest.raises(ValueError, match="divides by the clients' learning rate, which is 0.0. Give `lipschitz="):
        QFedAvgCallback().step(cohort(rates=(0.0, 0.0)), {}, SERVER)


# ---------------------------------------------------------------------- what a rule is told about clients


class Mean(pl.LightningModule):
    """``(w - x)^2 / 2``, with a value that is logged, and a metric."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.register_buffer("calls", torch.zeros(()))
        self.seen = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.seen(batch[0])
        self.log("x", batch[0].mean())
        self.log("seen", self.seen)
        return 0.5 * (self.w - batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25)


class Told(AggregationRule):
    """Keeps what it is told."""

    def __init__(self, needs_initial_loss=True, **federation):
        super().__init__(**federation)
        self.needs_initial_loss = needs_initial_loss

    def init(self, start, num_examples):
        return {"logged": [], "losses": []}

    def step(self, cohort, state, server):
        logged = [*state["logged"], [dict(values) for values in cohort.logged]]
        losses = [*state["losses"], cohort.initial_losses.tolist()]
        output = FedAvgCallback().step(cohort, state, server)
        return replace(output, state={"logged": logged, "losses": losses})


def fit(rule, module=None, rounds=2, callbacks=(), **options):
    module = module or Mean()
    data = DataLoader(TensorDataset(torch.tensor([1.0, 3.0, 2.0, 4.0, 4.0])), batch_size=2)
    options = {**QUIET, "client_eval": False, "partitioner": IndexPartitioner([[0, 1], [2, 3, 4]]), **options}
    FederatedTrainer(rounds=rounds, callbacks=[rule, *callbacks], **options).fit(module, data)
    return module


@forks
@pytest.mark.parametrize("place", [{}, {"devices": 2, "strategy": "federated_notebook"}], ids=["one", "two"])
def test_losses_at_the_broadcast_model_and_logged_values(place):
    rule = Told()
    module = fit(rule, rounds=1, **place)
    # At w = 0: (1 + 9) / 4 = 2.5, and (4 + 16 + 16) / 6 = 6, in batches of two and one.
    assert rule.state["losses"] == [[2.5, 6.0]]
    # The metric is pooled over all clients, so a rule is not given it.
    assert rule.state["logged"] == [[{"x": 2.0}, {"x": pytest.approx(10 / 3)}]]
    # The pass for the losses counts no call and no sample: clients made 1 and 2 calls, of weights 2 and 3.
    assert module.calls.item() == pytest.approx((2 * 1 + 3 * 2) / 5)


def test_losses_are_not_computed_unless_they_are_asked_for():
    rule = Told(needs_initial_loss=False)
    fit(rule)
    assert rule.state["losses"] == [[], []]
    assert len(rule.state["logged"]) == 2


def test_the_pass_for_the_losses_changes_no_number():
    ends = [flat(fit(Told(needs))) for needs in (True, False)]
    assert torch.equal(*ends)
    models = []
    for needs in (True, False):
        module = Classifier(norm=True, dropout=0.5)
        trainer(rule=Told(needs)).fit(module, loader())
        models.append(flat(module))
    assert torch.equal(*models)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_both_engines_tell_the_same(engine):
    class Plain(Mean):
        def training_step(self, batch, batch_idx):
            self.log("x", batch[0].mean())
            return 0.5 * (self.w - batch[0]).square().mean()

    rule = Told()
    fit(rule, Plain(), rounds=1, engine=engine)
    assert rule.state["losses"] == [[2.5, 6.0]]
    assert rule.state["logged"] == [[{"x": 2.0}, {"x": pytest.approx(10 / 3)}]]


def test_a_substitute_has_no_loss():
    class Loses(Channel):
        def outage(self, round_idx, clients, seed):
            return torch.tensor([round_idx == 1 and client == 1 for client in clients])

    rule = Told()
    fit(rule, callbacks=[Loses(fallback="reuse_update")])
    assert rule.state["losses"][1][1] != rule.state["losses"][1][1]
    assert rule.state["logged"][1][1] == {}
    assert rule.state["losses"][1][0] == rule.state["losses"][1][0]


def test_in_a_federation_by_hand():
    # Rate 1/4: L = 4. Client 0: 0 -> 0.5. Client 1: 0 -> 0.75 -> 0.75 + (4 - 0.75) / 4 = 1.5625. F = 2.5, 6; q = 1.
    # u = -2, -6.25; F u = -5, -37.5; h = 4 + 10 = 14 and 39.0625 + 24 = 63.0625.
    module = fit(QFedAvgCallback(q=1.0), rounds=1)
    assert module.w.item() == pytest.approx(42.5 / 77.0625)
    # The server's optimizer doubles it, and passes on what the rule needs.
    module = fit(FedOptCallback(rule=QFedAvgCallback(q=1.0), lr=2.0), rounds=1)
    assert module.w.item() == pytest.approx(85 / 77.0625)


def test_in_a_stock_trainer():
    module = Mean()
    rule = QFedAvgCallback(partitioner=IndexPartitioner([[0, 1], [2, 3, 4]]), client_eval=False)
    data = DataLoader(TensorDataset(torch.tensor([1.0, 3.0, 2.0, 4.0, 4.0])), batch_size=2)
    pl.Trainer(max_epochs=1, callbacks=[rule], **QUIET).fit(module, data)
    assert module.w.item() == pytest.approx(42.5 / 77.0625)


def test_a_rule_may_weigh_by_what_clients_log():
    class ByX(AggregationRule):
        def step(self, cohort, state, server):
            weights = torch.tensor([values["x"] for values in cohort.logged], dtype=torch.float64)
            weights = weights / weights.sum()
            return RuleOutput(cohort.vectors.weighted_sum(weights), state, weights)

    module = fit(ByX(), rounds=1)
    # x is 2 and 10/3, so the weights are 3/8 and 5/8.
    assert module.w.item() == pytest.approx(3 / 8 * 0.5 + 5 / 8 * 1.5625)

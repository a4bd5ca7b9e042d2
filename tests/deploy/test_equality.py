"""A deployment gives the bits of the simulator, whatever its rule, objectives, buffers and what its clients keep."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from deployments import PARTS, PROXY, deploy, differences, in_memory, simulate
from federations import Classifier, momentum, samples
from lightning_fedhaw import FedAvgCallback, FedDFCallback, FedHAWCallback, FedProx, ScaffoldCallback
from lightning_fedhaw.deploy import ClientSide
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.objectives import MOON, FedDynObjective, FedNTD
from resuming import Scheduled
from test_contract import IN_FEDERATIONS

WITH_OTHER_CLIENTS = ("FedAvg by batches", "FedAvg by own weights", "FedOpt on SCAFFOLD", "FedNova proximal")
"""Settings of a rule that read or change what its clients do."""


def rules():
    """One setting of each class of rules, and those with other clients."""
    classes = set()
    for name, make in IN_FEDERATIONS.items():
        if type(make()) not in classes or name in (*WITH_OTHER_CLIENTS, "FedHyper G+SL", "FedHyper G+CL"):
            classes.add(type(make()))
            yield name


class Predictor(Classifier):
    """A module that can be called, for rules that distil; it logs a metric of torchmetrics in no step."""

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("name", list(rules()))
def test_every_rule_equals_the_simulator_or_is_refused_by_name(name):
    make = IN_FEDERATIONS[name]
    rule = make()
    if rule.probe is not None or type(rule).inquiry is not AggregationRule.inquiry:
        with pytest.raises(ValueError, match=rf"`{type(rule).__name__}` .* not supported in a deployment"):
            deploy(lambda: [make()], Predictor)
        return
    side = deploy(lambda: [make()], Predictor, proxy=PROXY)
    assert differences(side, *simulate(lambda: [make()], Predictor, proxy=PROXY)) == []
    tally = side.trainer.federation_summary
    assert tally["clients_per_round"] == 3


@pytest.mark.parametrize("name", [name for name in IN_FEDERATIONS if "probe" in name or "learn" in name])
def test_settings_that_ask_a_second_cohort_are_refused(name):
    rule = IN_FEDERATIONS[name]()
    if rule.probe is not None:
        with pytest.raises(ValueError, match="asks a second cohort"):
            deploy(lambda: [rule])


class Counting(Classifier):
    """Counts its batches, which each client keeps, draws dropout and scales its loss by the count."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.batches = 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        return super().training_step(batch, batch_idx) / self.batches


class Normed(Classifier):
    """Has BatchNorm, spectral norm, a frozen layer, and starts with statistics of its own."""

    def __init__(self):
        super().__init__(momentum, norm=True)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.frozen = nn.Linear(6, 6).requires_grad_(False)
            self.net[0] = nn.utils.parametrizations.spectral_norm(self.net[0])
        self.net[1].running_mean += 0.5

    def forward(self, x):
        return self.net(self.frozen(x))

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss


CASES = {
    "FedProx": ([FedAvgCallback, partial(FedProx, 0.5)], Classifier, {}),
    "FedDyn's objective": ([FedAvgCallback, FedDynObjective], Classifier, {"rounds": 3, "clients_per_round": 2}),
    "SCAFFOLD, option I": ([partial(ScaffoldCallback, option="I")], Classifier, {"clients_per_round": 2}),
    "MOON": ([FedAvgCallback, partial(MOON, representation="net.1")], Predictor, {}),
    "FedNTD": ([FedAvgCallback, FedNTD], Scheduled, {"rounds": 3}),
    "kept momentum": ([FedAvgCallback], partial(Classifier, momentum), {"optimizer_state": "kept"}),
    "schedule": ([FedHAWCallback], Scheduled, {"rounds": 3, "clients_per_round": 1}),
    "half precision": ([FedHAWCallback], Scheduled, {"rounds": 3, "precision": "bf16-true"}),
    "rates and work of each": (
        [FedAvgCallback],
        Classifier,
        {"client_lr_scale": [1, 2, 0.5], "local_steps": [1, 5, 2]},
    ),
    "attributes": ([FedAvgCallback], Counting, {"rounds": 3, "clients_per_round": 2}),
    "local parameters": ([FedHAWCallback], Classifier, {"local_parameters": "net.3.*", "client_eval": True}),
    "averaged buffers": ([FedHAWCallback], Normed, {}),
    "kept buffers": ([FedHAWCallback], Normed, {"buffers": "keep"}),
    "local buffers": ([FedHAWCallback], Normed, {"buffers": "local", "rounds": 3, "clients_per_round": 2}),
    "held-out samples": (
        [FedAvgCallback],
        Classifier,
        {"client_val_fraction": 0.3, "client_eval": True, "client_eval_every_n_rounds": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_everything_at_the_clients_equals_the_simulator(case):
    makers, model, options = CASES[case]
    side = deploy(lambda: [make() for make in makers], model, **options)
    trainer, module = simulate(lambda: [make() for make in makers], model, **options)
    assert differences(side, trainer, module) == []
    for name in ("client_metrics", "bytes_down", "bytes_up", "metrics"):
        assert repr(side.trainer.federation_summary[name]) == repr(trainer.federation_summary[name])


def test_a_site_with_its_own_evaluation_data_and_a_server_with_validation_data():
    val = [samples(5 + part, seed=part) for part in range(3)]

    def data(part):
        from lightning_fedhaw import FederatedDataModule

        return FederatedDataModule([PARTS[part]], batch_size=4, val=[val[part]])

    options = {"client_eval": True}
    sites = in_memory(lambda: [FedAvgCallback()], parts=(), **options)
    for part in range(3):
        site = ClientSide(partial(trainer_of, options), Classifier, partial(data, part), name=f"{part}")
        sites.clients[f"{part}"] = site
    side = deploy(lambda: [FedAvgCallback()], sites=sites, val=samples(18, seed=9), **options)
    trainer, _ = simulate(lambda: [FedAvgCallback()], val=val, **options)
    here = side.trainer.federation_summary["client_metrics"]["val_loss"]
    there = trainer.federation_summary["client_metrics"]["val_loss"]
    assert {name: here[name] for name in ("mean", "weighted_mean", "gap")} == {
        name: there[name] for name in ("mean", "weighted_mean", "gap")
    }
    assert "val_loss" in side.trainer.callback_metrics


def trainer_of(options):
    from deployments import make_trainer

    return make_trainer(lambda: [FedAvgCallback()], **options)


@pytest.mark.parametrize("policy", ["keep", "local"])
def test_a_rule_that_reads_buffers_which_are_not_sent_is_refused(policy):
    with pytest.raises(
        ValueError, match=rf"`FedDFCallback` computes with the clients' buffers, and `net.1.* \('{policy}'"
    ):
        deploy(lambda: [FedDFCallback()], partial(Classifier, norm=True), buffers=policy)


def test_recalibration_is_refused():
    with pytest.raises(ValueError, match='`buffers="recalibrate"` .* runs the new global model on the clients'):
        deploy(lambda: [FedAvgCallback()], partial(Classifier, norm=True), buffers="recalibrate")

"""A deployment gives the bits of the simulator, whatever its rule, objectives, buffers and what its clients keep."""

import os
from functools import partial

import pytest
import torch
from torch import nn

from deployments import PARTS, PROXY, Plain, client_side, deploy, differences, in_memory, simulate
from federations import momentum, samples
from lightning_fedhaw import (
    FedAvgCallback,
    FedDFCallback,
    FederatedDataModule,
    FedHAWCallback,
    FedProx,
    ScaffoldCallback,
)
from lightning_fedhaw.extending import AggregationRule
from lightning_fedhaw.objectives import MOON, FedDynObjective, FedNTD
from resuming import Scheduled
from test_contract import IN_FEDERATIONS

EVERY_RULE = "FEDHAW_EVERY_RULE" in os.environ
"""Whether all settings of all rules are tried, which takes a minute more."""


def interface(rule):
    """What a rule asks of clients and server. Rules are pure functions of that, so one of each kind is enough."""
    return (
        rule.probe is None,
        type(rule).inquiry is AggregationRule.inquiry,
        # What FedHyper adapts: rates of the server, of all clients, of each.
        getattr(rule, "adapt", ""),
        type(rule).check is AggregationRule.check,
        tuple(type(objective) for objective in rule.objectives),
        rule.unnormalized_weight is None,
        rule.needs_learning_rates,
        rule.needs_initial_loss,
        rule.reads_buffers,
    )


def rules():
    """One setting of each kind of rules, or all."""
    seen = set()
    for name, make in IN_FEDERATIONS.items():
        kind = interface(make())
        if EVERY_RULE or kind not in seen:
            seen.add(kind)
            yield name


@pytest.mark.parametrize("name", list(rules()))
def test_every_rule_equals_the_simulator_or_is_refused_by_name(name):
    make = IN_FEDERATIONS[name]
    rule = make()
    if rule.probe is not None or type(rule).inquiry is not AggregationRule.inquiry:
        with pytest.raises(ValueError, match=rf"`{type(rule).__name__}` .* not supported in a deployment"):
            deploy(lambda: [make()])
        return
    side = deploy(lambda: [make()], proxy=PROXY)
    assert differences(side, *simulate(lambda: [make()], proxy=PROXY)) == []
    assert side.trainer.federation_summary["clients_per_round"] == 3


class Counting(Plain):
    """Counts its batches, which each client keeps, draws dropout and scales its loss by the count."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.batches = 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        return super().training_step(batch, batch_idx) / self.batches


class Normed(Plain):
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


CASES = {
    "FedProx": ([FedAvgCallback, partial(FedProx, 0.5)], Plain, {}),
    "FedDyn's objective": ([FedAvgCallback, FedDynObjective], Plain, {"rounds": 3, "clients_per_round": 2}),
    "SCAFFOLD, option I": ([partial(ScaffoldCallback, option="I")], Plain, {"clients_per_round": 2}),
    "MOON": ([FedAvgCallback, partial(MOON, representation="net.1")], Plain, {}),
    "FedNTD": ([FedAvgCallback, FedNTD], Scheduled, {"rounds": 3}),
    "kept momentum": ([FedAvgCallback], partial(Plain, momentum), {"optimizer_state": "kept"}),
    "schedule": ([FedHAWCallback], Scheduled, {"rounds": 3, "clients_per_round": 1}),
    "half precision": ([FedHAWCallback], Scheduled, {"rounds": 3, "precision": "bf16-true"}),
    "rates and work of each": (
        [FedAvgCallback],
        Plain,
        {"client_lr_scale": [1, 2, 0.5], "local_steps": [1, 5, 2]},
    ),
    "attributes": ([FedAvgCallback], Counting, {"rounds": 3, "clients_per_round": 2}),
    "local parameters": ([FedHAWCallback], Plain, {"local_parameters": "net.3.*", "client_eval": True}),
    "averaged buffers": ([FedHAWCallback], Normed, {}),
    "kept buffers": ([FedHAWCallback], Normed, {"buffers": "keep"}),
    "local buffers": ([FedHAWCallback], Normed, {"buffers": "local", "rounds": 3, "clients_per_round": 2}),
    "held-out samples": (
        [FedAvgCallback],
        Plain,
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
    make = lambda: [FedAvgCallback()]  # noqa: E731
    options = {"client_eval": True, "rounds": 1}
    sites = in_memory(make, parts=())
    for part in range(3):
        data = partial(FederatedDataModule, [PARTS[part]], batch_size=4, val=[val[part]])
        sites.clients[f"{part}"] = client_side(make, part=part, data=data, **options)
    side = deploy(make, sites=sites, val=samples(18, seed=9), **options)
    trainer, _ = simulate(make, val=val, **options)
    here = side.trainer.federation_summary["client_metrics"]["val_loss"]
    there = trainer.federation_summary["client_metrics"]["val_loss"]
    # The server's own validation data are others.
    assert here.pop("validation") != there.pop("validation")
    assert here == there


@pytest.mark.parametrize("policy", ["keep", "local"])
def test_a_rule_that_reads_buffers_which_are_not_sent_is_refused(policy):
    with pytest.raises(
        ValueError, match=rf"`FedDFCallback` computes with the clients' buffers, and `net.1.* \('{policy}'"
    ):
        deploy(lambda: [FedDFCallback()], partial(Plain, norm=True), buffers=policy)


def test_recalibration_is_refused():
    with pytest.raises(ValueError, match='`buffers="recalibrate"` .* runs the new global model on the clients'):
        deploy(lambda: [FedAvgCallback()], partial(Plain, norm=True), buffers="recalibrate")

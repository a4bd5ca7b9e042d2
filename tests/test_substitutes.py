"""Substitutes for lost updates, which rules that compare clients or learn what they are worth do not see."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.data import TensorDataset

from federations import Classifier, flat, samples, trainer
from lightning_fedhaw import (
    CoordinateMedianCallback,
    ErasureChannel,
    FedAdpCallback,
    FedAvgCallback,
    FedAvgMCallback,
    FederatedCallback,
    FederatedDataModule,
    FedHAWCallback,
    FedLAWCallback,
    FedLWSCallback,
    GeometricMedianCallback,
    IndexPartitioner,
    KrumCallback,
    MultiKrumCallback,
    PublishedFedHAWCallback,
    TrimmedMeanCallback,
)
from lightning_fedhaw.extending import AggregationRule, Channel, RuleOutput

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")

COMPARING = {
    "FedHAW": FedHAWCallback,
    "FedHAW without weights": lambda: FedHAWCallback(lr_lambda=0),
    "FedHAW as published": lambda: PublishedFedHAWCallback(takes_substitutes=False),
    "FedAdp": FedAdpCallback,
    "FedLWS": FedLWSCallback,
    "FedLAW": lambda: FedLAWCallback(server_epochs=2),
    "momentum on FedHAW": lambda: FedAvgMCallback(rule=FedHAWCallback()),
    "median": CoordinateMedianCallback,
    "trimmed mean": TrimmedMeanCallback,
    "Krum": lambda: KrumCallback(0),
    "Multi-Krum": lambda: MultiKrumCallback(0),
    "geometric median": GeometricMedianCallback,
}
AVERAGING = {
    "FedAvg": FedAvgCallback,
    "FedHAW as published": PublishedFedHAWCallback,
    "FedAdp of the code": lambda: FedAdpCallback(smooth_substitutes=True),
    "FedLAW that learns nothing": lambda: FedLAWCallback("nothing"),
}


class Lost(Channel):
    """Loses the listed clients in the listed rounds."""

    def __init__(self, clients, fallback="zero_update"):
        super().__init__(fallback=fallback)
        self.clients = clients

    def outage(self, round_idx, clients, seed):
        lost = self.clients.get(round_idx, ()) if isinstance(self.clients, dict) else self.clients(round_idx)
        return torch.tensor([client in lost for client in clients])


def fit(rule, *callbacks, rounds=3, num_clients=5, **options):
    """A federation of five clients, and data of the server's own."""
    data = FederatedDataModule(samples(130), batch_size=8, proxy=20)
    runner, module = trainer(rounds, rule, callbacks, num_clients=num_clients, seed=0, **options), Classifier()
    runner.fit(module, data)
    return flat(module), runner


def ends_by_fallback(make, **options):
    """The models after two losses, with a substitute of zeros and with none."""
    losses = {1: [0], 2: [3]}
    return [fit(make(), Lost(losses, fallback), **options)[0] for fallback in ("zero_update", "discard")]


@pytest.mark.parametrize("make", COMPARING.values(), ids=COMPARING.keys())
def test_a_rule_that_compares_does_not_see_substitutes(make):
    assert torch.equal(*ends_by_fallback(make))


def test_with_either_engine_and_with_two_processes_it_does_not_see_them_either():
    two = {"devices": 2, "strategy": "federated_notebook"}
    for options in ({"engine": "vectorized"}, two):
        assert torch.equal(*ends_by_fallback(FedHAWCallback, **options))


@pytest.mark.parametrize("make", AVERAGING.values(), ids=AVERAGING.keys())
def test_a_rule_that_averages_does(make):
    assert not torch.equal(*ends_by_fallback(make))


def identical_clients(rule, **options):
    """Ten clients with the same samples, the first of which fails in two rounds of three."""
    one = samples(12)
    data = TensorDataset(one.tensors[0].repeat(10, 1), one.tensors[1].repeat(10))
    split = IndexPartitioner([range(12 * k, 12 * k + 12) for k in range(10)])
    channel = Lost(lambda round_idx: [0] if round_idx % 3 else [], **options)
    runner = trainer(6, rule, [channel], num_clients=10, alpha=None, partitioner=split, client_eval=False)
    runner.fit(Classifier(), FederatedDataModule(data, batch_size=12))
    return torch.softmax(rule.state["lambda_"], 0)


def test_a_failing_client_of_ten_identical_ones_keeps_its_weight():
    exact = {"lr_gamma": 0.0, "lr_lambda": 1.0, "jacobian": "exact"}
    for rule in (FedHAWCallback(), PublishedFedHAWCallback(**exact, takes_substitutes=False)):
        assert identical_clients(rule).tolist() == pytest.approx([0.1] * 10, abs=1e-6)
    weights = identical_clients(PublishedFedHAWCallback(**exact))
    assert abs(weights[0] - 0.1) > 1e-4, "as published, zeros are read as the client's opinion"


class Counting(AggregationRule):
    """FedAvg that needs some updates, and remembers how many it was given."""

    def __init__(self, min_updates=1, **federation):
        super().__init__(**federation)
        self.min_updates = min_updates

    def step(self, cohort, state, server):
        weights = self.cohort_weights(cohort)
        sizes = [*state.get("sizes", []), len(cohort)]
        return RuleOutput(cohort.vectors.weighted_sum(weights), {"sizes": sizes}, weights)


@pytest.mark.parametrize("make", [lambda: KrumCallback(1), lambda: TrimmedMeanCallback(2)], ids=["Krum", "trimmed"])
def test_a_round_that_losses_leave_with_too_few_updates_is_skipped(make):
    rule = make()
    name = type(rule).__name__
    reference, _ = fit(make(), rounds=1)
    message = f"4 updates were received of the 5 that `{name}` needs in round 1: the global model and the rule"
    with pytest.warns(UserWarning, match=message):
        end, runner = fit(rule, Lost({1: [2]}), rounds=2)
    assert torch.equal(end, reference)
    assert runner.federation_summary["skipped_rounds"] == 1
    assert float(runner.callback_metrics["round_skipped"]) == 1
    assert float(runner.callback_metrics["clients_received"]) == 4
    end, _ = fit(make(), rounds=2)
    assert not torch.equal(end, reference)


def test_too_few_clients_to_begin_with_end_the_run():
    with pytest.raises(ValueError, match="needs at least 5 clients a round for KrumCallback, and round 0 has 3"):
        fit(KrumCallback(1), Lost({0: [1]}), num_clients=4)


def test_a_rule_on_a_rule_needs_what_the_inner_one_needs():
    outer = FedAvgMCallback(rule=MultiKrumCallback(1, keep=6))
    assert outer.min_updates == 7
    assert not outer.takes_substitutes
    with pytest.warns(UserWarning, match="4 updates were received of the 5 that `KrumCallback` needs in round 0"):
        fit(FedAvgMCallback(rule=KrumCallback(1)), Lost({0: [2]}), rounds=1)


def test_a_rule_of_ones_own_says_how_many_updates_it_needs():
    rule = Counting(4)
    with pytest.warns(UserWarning, match="3 updates were received of the 4 that `Counting` needs in round 1"):
        fit(rule, Lost({1: [0, 1]}, "discard"))
    assert rule.state["sizes"] == [5, 5]
    rule = Counting(4)
    fit(rule, Lost({1: [0, 1]}))
    assert rule.state["sizes"] == [5, 5, 5], "it takes substitutes, and they are counted"


def test_without_substitutes_there_is_nothing_to_follow():
    rule = FedHAWCallback()
    with pytest.warns(UserWarning, match="No client update was received in round 1"):
        fit(rule, Lost({1: range(5)}), empty_round="follow")


class Diary(FederatedCallback):
    """Notes the model and the number of received updates after every round."""

    def __init__(self):
        self.models, self.received = [flat(Classifier())], []

    def on_round_end(self, trainer, pl_module, report):
        self.models.append(flat(pl_module))
        self.received.append(report.metrics["clients_received"])


@pytest.mark.filterwarnings("ignore:. updates were received of the")
def test_krum_moves_in_every_round_with_enough_updates():
    diary = Diary()
    _, runner = fit(KrumCallback(1), ErasureChannel(0.5), diary, rounds=8, num_clients=10, client_eval=False)
    stands_still = [torch.equal(before, after) for before, after in pairwise(diary.models)]
    assert stands_still == [count < 5 for count in diary.received]
    assert runner.federation_summary["skipped_rounds"] == sum(stands_still)
    assert 0 < sum(stands_still) < 6

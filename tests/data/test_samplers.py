from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest
import torch

from federations import loader, train
from lightning_fedhaw import (
    FedAvgCallback,
    FedAvgMCallback,
    FederatedCallback,
    FedLWSCallback,
    FedNovaCallback,
    IndexPartitioner,
)
from lightning_fedhaw.data.samplers import (
    FixedSequenceSampler,
    FullParticipationSampler,
    UniformSampler,
    WeightedSampler,
)

SIZES = torch.tensor([5, 1, 0, 10, 4])
SAMPLERS = {
    "everyone": (FullParticipationSampler(), 5),
    "uniform": (UniformSampler(2), 2),
    "uniform, share": (UniformSampler(0.5), 3),
    "weighted": (WeightedSampler(3), 3),
    "weighted, given": (WeightedSampler(0.2, [1, 2, 3, 4, 5]), 1),
    "fixed": (FixedSequenceSampler([[3, 0]] * 200), 2),
}


def draw(sampler, round_idx=0, num_clients=5, seed=0):
    return sampler.sample(round_idx, num_clients=num_clients, sizes=SIZES[:num_clients], seed=seed)


@pytest.mark.parametrize("name", SAMPLERS)
def test_contract(name):
    sampler, many = SAMPLERS[name]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for round_idx in range(20):
        cohort = draw(sampler, round_idx)
        assert cohort == sorted(set(cohort))
        assert len(cohort) == many
        assert all(type(client) is int and 0 <= client < 5 for client in cohort)
        assert draw(sampler, round_idx) == cohort
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", ["uniform", "uniform, share", "weighted", "weighted, given"])
def test_rounds_and_seeds_draw_anew(name):
    sampler, _ = SAMPLERS[name]
    rounds = [draw(sampler, round_idx) for round_idx in range(20)]
    assert len(set(map(tuple, rounds))) > 1
    assert rounds != [draw(sampler, round_idx, seed=1) for round_idx in range(20)]


def test_uniform_is_uniform():
    came = Counter(client for round_idx in range(2000) for client in draw(UniformSampler(2), round_idx))
    assert all(came[client] == pytest.approx(800, abs=100) for client in range(5))  # sd 22


def test_weights_are_client_sizes_and_zero_never_comes():
    came = Counter(client for round_idx in range(2000) for client in draw(WeightedSampler(1), round_idx))
    expected = [500, 100, 0, 1000, 400]
    assert [came[client] for client in range(5)] == pytest.approx(expected, abs=90)
    pairs = Counter(tuple(draw(WeightedSampler(2, [2, 1, 1]), round_idx, 3)) for round_idx in range(3000))
    # First 0 (1/2) then 1 (1/2), or first 1 (1/4) then 0 (2/3): 1/4 + 1/6 = 5/12; the pair (1, 2) gets the rest, 1/6.
    assert pairs[0, 1] == pytest.approx(1250, abs=110)
    assert pairs[1, 2] == pytest.approx(500, abs=90)


@pytest.mark.parametrize(("share", "many"), [(0.01, 1), (0.3, 2), (0.5, 3), (1.0, 5)])
def test_a_share_is_rounded_and_at_least_one(share, many):
    assert len(draw(UniformSampler(share))) == many


def test_one_as_a_number_and_as_a_share():
    assert len(draw(UniformSampler(1))) == 1
    assert len(draw(UniformSampler(1.0))) == 5


def test_fixed_sequence_goes_through_its_cohorts():
    sampler = FixedSequenceSampler([[2, 0], torch.tensor([1])])
    assert [draw(sampler, round_idx) for round_idx in (0, 1, 0)] == [[0, 2], [1], [0, 2]]
    with pytest.raises(ValueError, match="`cohorts` must have an entry for every round, got 2 where round 2 "):
        draw(sampler, 2)
    with pytest.raises(ValueError, match=r"`cohorts` must name clients in 0 \.\. 1, got \[0, 2\] for round 0"):
        draw(sampler, 0, num_clients=2)


@pytest.mark.parametrize("sampler", [UniformSampler, WeightedSampler])
@pytest.mark.parametrize("per_round", [0, -1, 0.0, 1.5, True, "2", float("nan")])
def test_clients_per_round_out_of_range(sampler, per_round):
    with pytest.raises(ValueError, match="`clients_per_round`"):
        sampler(per_round)


@pytest.mark.parametrize("sampler", [UniformSampler(6), WeightedSampler(6)])
def test_more_than_there_are(sampler):
    with pytest.raises(ValueError, match="`clients_per_round` must be at most the number of clients, 5, got 6"):
        draw(sampler)


@pytest.mark.parametrize("weights", [[1, -1], [float("nan"), 1], [[1, 2]]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="`weights` must be one finite number"):
        WeightedSampler(1, weights)


def test_weights_that_do_not_fit():
    with pytest.raises(ValueError, match=r"`weights` must have one entry per client \(5\), got 2"):
        draw(WeightedSampler(1, [1, 2]))
    with pytest.raises(ValueError, match="`weights` must be positive for at least the 5 clients of a round, got 4"):
        draw(WeightedSampler(5))


@pytest.mark.parametrize("cohorts", [[[0], []], [[0], [1, 1]]])
def test_bad_cohorts(cohorts):
    with pytest.raises(ValueError, match=r"`cohorts` must name at least one client a round and none twice.*round 1"):
        FixedSequenceSampler(cohorts)


@pytest.mark.parametrize("cohorts", [torch.tensor(float("nan")), torch.tensor(2), "01", 3, [torch.tensor(1)], [3]])
def test_what_lists_no_clients(cohorts):
    with pytest.raises(ValueError, match="`cohorts` must be a list of client numbers for each round, got"):
        FixedSequenceSampler(cohorts)


def test_samplers_compare_by_value():
    assert UniformSampler(2) == UniformSampler(2) != UniformSampler(3)
    assert FixedSequenceSampler([[1, 0]]) == FixedSequenceSampler(([0, 1],))


def exact_draws(weights, count):
    """The probability of each cohort, and of each cohort whose client k came first, by going through all orders."""
    cohorts, first = Counter(), Counter()
    for order in permutations(range(len(weights)), count):
        probability, rest = 1.0, sum(weights)
        for client in order:
            probability *= weights[client] / rest
            rest -= weights[client]
        cohorts[tuple(sorted(order))] += probability
        first[tuple(sorted(order)), order[0]] += probability
    return cohorts, first


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("weights", [None, [1, 1, 5, 2, 2]])
def test_sizes_are_not_counted_twice(count, weights):
    sizes = torch.tensor([10, 20, 30, 40, 100])
    sampler = WeightedSampler(count, weights)
    drawn_by = weights or sizes.tolist()
    cohorts, first = exact_draws(drawn_by, count)
    expected = torch.zeros(5, dtype=torch.float64)
    shares = torch.zeros(5, dtype=torch.float64)
    for cohort, probability in cohorts.items():
        clients = list(cohort)
        factors = sampler.inverse_probabilities(clients, num_clients=5, sizes=sizes)
        exact = [first[cohort, k] / probability / (drawn_by[k] / sum(drawn_by)) for k in clients]
        assert factors.tolist() == pytest.approx(exact, rel=1e-9)
        expected[clients] += probability * factors
        weights_of_rule = sizes[clients] * factors
        shares[clients] += probability * weights_of_rule / weights_of_rule.sum()
    assert expected.tolist() == pytest.approx([1.0] * 5)
    if weights is None:
        assert shares.tolist() == pytest.approx([0.05, 0.10, 0.15, 0.20, 0.50])


def test_two_of_three_by_hand():
    # P(first 0) = 1/2, then 1: 1/4 of 1/2; first 1 (1/4), then 0: 2/3. P({0, 1}) = 1/4 + 1/6 = 5/12.
    factors = WeightedSampler(2, [2, 1, 1]).inverse_probabilities([0, 1], num_clients=3, sizes=torch.ones(3))
    assert factors.tolist() == pytest.approx([1 / 2 / (5 / 12), 2 / 3 / (5 / 12)])


def test_equal_chances_need_no_factors():
    for sampler in (FullParticipationSampler(), UniformSampler(2), FixedSequenceSampler([[0]])):
        assert sampler.inverse_probabilities([0], num_clients=3, sizes=SIZES[:3]) is None


@pytest.mark.parametrize("rule", [FedAvgCallback, FedAvgMCallback, FedLWSCallback, FedNovaCallback])
def test_rules_that_weigh_by_examples_use_the_factors(rule):
    sizes = [4, 8, 20]
    sampler = WeightedSampler(2)
    weights = []

    class Notes(FederatedCallback):
        def on_round_end(self, trainer, pl_module, report):
            weights.append(report.weights)

    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = IndexPartitioner([range(end - size, end) for size, end in zip(sizes, ends, strict=True)])
    train(data=loader(32), rounds=3, rule=rule(), callbacks=[Notes()], sampler=sampler, alpha=None, num_clients=3,
          partitioner=parts, client_eval=False)  # fmt: skip
    for of_round in weights:
        clients = list(of_round)
        factors = sampler.inverse_probabilities(clients, num_clients=3, sizes=torch.tensor(sizes))
        unnormalized = torch.tensor([sizes[client] for client in clients]) * factors
        assert list(of_round.values()) == pytest.approx((unnormalized / unnormalized.sum()).tolist())


def test_weights_of_another_kind_are_not_touched():
    weights = []

    class Notes(FederatedCallback):
        def on_round_end(self, trainer, pl_module, report):
            weights.extend(report.weights.values())

    train(data=loader(32), rounds=2, rule=FedAvgCallback("uniform"), callbacks=[Notes()], sampler=WeightedSampler(2))
    assert weights == [0.5] * 4

"""Robust rules: what they are, and what one wrong client can do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from federations import Classifier, flat, loader, train, trainer, val_loader
from lightning_fedhaw import (
    CoordinateMedianCallback,
    FedAvgCallback,
    GeometricMedianCallback,
    KrumCallback,
    MultiKrumCallback,
    TrimmedMeanCallback,
)
from lightning_fedhaw.aggregation.robust import geometric_median_weights, krum_scores, trimmed_mean
from lightning_fedhaw.extending import Channel, ClientVectors, Cohort, ParameterLayout
from lightning_fedhaw.server import Server
from lightning_fedhaw.vectors.kernels import CPU

MODULE = nn.Linear(1, 1).double()
SERVER = Server(MODULE, ParameterLayout.of(MODULE))
START = torch.tensor([10.0, -10.0], dtype=torch.float64)
# Four clients near (1, 2) and one far away.
MODELS = torch.tensor([[1.0, 2.0], [1.2, 2.0], [1.0, 2.4], [0.9, 1.9], [90.0, -70.0]], dtype=torch.float64)


def step(rule, models=MODELS, examples=None, clients=None):
    many = len(models)
    cohort = Cohort(
        round=4,
        clients=torch.arange(many) if clients is None else torch.tensor(clients),
        num_examples=torch.ones(many, dtype=torch.int64) if examples is None else torch.tensor(examples),
        num_steps=torch.ones(many, dtype=torch.int64),
        received=torch.ones(many, dtype=torch.bool),
        start=START,
        vectors=ClientVectors(models - START, START),
    )
    return rule.step(cohort, {}, SERVER)


def test_median_of_odd_and_even_numbers_of_clients():
    assert step(CoordinateMedianCallback()).parameters.tolist() == pytest.approx([1.0, 2.0])
    assert step(CoordinateMedianCallback(), MODELS[:4]).parameters.tolist() == pytest.approx([1.0, 2.0])
    assert step(CoordinateMedianCallback(), MODELS[1:3]).parameters.tolist() == pytest.approx([1.1, 2.2])
    assert step(CoordinateMedianCallback()).weights.tolist() == pytest.approx([0.2] * 5)


def test_trimmed_mean_by_hand():
    expected = [(1.0 + 1.2 + 1.0) / 3, (2.0 + 2.0 + 1.9) / 3]
    assert step(TrimmedMeanCallback(1)).parameters.tolist() == pytest.approx(expected)
    assert step(TrimmedMeanCallback(2)).parameters.tolist() == pytest.approx([1.0, 2.0])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(0, 1000), st.booleans())
def test_columns_are_mapped_as_the_whole_matrix_would_be(k, p, seed, start):
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(k, p, generator=g, dtype=torch.float64)
    vectors = ClientVectors(matrix, torch.randn(p, generator=g, dtype=torch.float64) if start else None)
    assert torch.equal(vectors.map_columns(lambda rows: rows.amax(0)), vectors.gather().amax(0))


def test_many_columns_are_mapped_a_block_at_a_time():
    matrix = torch.randn(6, CPU.elements // 4)
    widths = []

    def median(rows):
        widths.append(rows.shape[1])
        return rows.median(0).values

    assert torch.equal(ClientVectors(matrix.bfloat16()).map_columns(median), matrix.bfloat16().float().median(0).values)
    assert sum(widths) == matrix.shape[1]
    assert max(widths) * 6 <= CPU.elements


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 1000), st.data())
def test_trimmed_mean_is_that_of_sorted_columns(k, seed, data):
    values = torch.randn(k, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cut = data.draw(st.integers(0, (k - 1) // 2))
    expected = values.sort(0).values[cut : k - cut].mean(0)
    assert torch.allclose(trimmed_mean(values, cut), expected, atol=1e-12)
    if k % 2:
        assert torch.equal(trimmed_mean(values.clone(), (k - 1) // 2), values.median(0).values)


def test_krum_takes_the_client_with_the_nearest_neighbors():
    # Squared distances to the two nearest of each of the first four: to (1, 2) they are 0.02 and 0.04.
    scores = krum_scores(ClientVectors(MODELS), 1)
    assert scores[:4].tolist() == pytest.approx([0.02 + 0.04, 0.04 + 0.10, 0.16 + 0.20, 0.02 + 0.10])
    assert scores[4] > 1e4
    end = step(KrumCallback(1))
    assert end.parameters.tolist() == pytest.approx([1.0, 2.0])
    assert end.weights.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_multi_krum_averages_the_best():
    assert step(MultiKrumCallback(1)).weights.tolist() == [0.5, 0.0, 0.0, 0.5, 0.0]
    end = step(MultiKrumCallback(1, keep=4))
    assert end.weights.tolist() == [0.25, 0.25, 0.25, 0.25, 0.0]
    assert end.parameters.tolist() == pytest.approx(MODELS[:4].mean(0).tolist())
    assert end.metrics == {"clients_chosen": 4.0}


def test_of_a_nearest_pair_krum_takes_the_lower_number():
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        end = step(KrumCallback(0), MODELS[:3][order], clients=[[7, 3, 5][i] for i in order])
        assert end.parameters.tolist() == pytest.approx([1.2, 2.0]), "clients 7 and 3 are the pair"


def test_geometric_median_of_a_triangle_and_of_a_line():
    # With angles below 120 degrees it is the Fermat point: for (0, 0), (1, 0), (0, 1) both coordinates are
    # (3 - sqrt 3) / 6. On a line it is the median.
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    weights, _ = geometric_median_weights(ClientVectors(triangle), third, 1e-9, 1e-12, 200)
    assert (weights @ triangle).tolist() == pytest.approx([(3 - 3**0.5) / 6] * 2, abs=1e-7)
    line = torch.tensor([[0.0, 0.0], [1.0, 2.0], [50.0, 100.0]], dtype=torch.float64)
    weights, _ = geometric_median_weights(ClientVectors(line), third, 1e-9, 1e-9, 500)
    assert (weights @ line).tolist() == pytest.approx([1.0, 2.0], abs=1e-3)


def test_geometric_median_weighs_by_examples_and_stops():
    end = step(GeometricMedianCallback())
    assert torch.allclose(end.parameters, end.weights @ MODELS)
    assert (end.parameters - MODELS[0]).norm() < 0.3
    assert end.weights[4] < 0.01
    heavy = step(GeometricMedianCallback(), examples=[1, 1, 100, 1, 1])
    assert (heavy.parameters - MODELS[2]).norm() < 1e-2
    assert step(GeometricMedianCallback(max_iterations=1)).metrics["iterations"] == 1
    same = step(GeometricMedianCallback(), MODELS[:1].expand(3, 2))
    assert same.parameters.tolist() == pytest.approx([1.0, 2.0])


ROBUST = {
    "median": CoordinateMedianCallback,
    "trimmed mean": TrimmedMeanCallback,
    "Krum": KrumCallback,
    "Multi-Krum": MultiKrumCallback,
    "geometric median": GeometricMedianCallback,
}


class Poisons(Channel):
    """Turns one client's update round and makes it long."""

    def transmit(self, message, *, round_idx, client, seed):
        return -30 * message if client == 1 else message


@pytest.mark.parametrize("make", ROBUST.values(), ids=ROBUST.keys())
def test_a_poisoned_client_moves_a_robust_model_by_little(make):
    def accuracy(rule, *callbacks):
        runner = trainer(rounds=15, rule=rule, callbacks=callbacks, num_clients=6)
        runner.fit(Classifier(), loader(240), val_loader())
        return float(runner.callback_metrics["val_acc"])

    assert accuracy(FedAvgCallback(), Poisons()) < 0.5  # one of three classes by chance
    assert accuracy(make(), Poisons()) > 0.7


@pytest.mark.parametrize(
    ("rule", "needed"),
    [(TrimmedMeanCallback(2), 5), (KrumCallback(1), 5), (MultiKrumCallback(0, keep=6), 6), (MultiKrumCallback(2), 7)],
    ids=["trimmed mean", "Krum", "keep", "Multi-Krum"],
)
def test_too_few_clients_are_one_sentence(rule, needed):
    message = (
        rf"`num_byzantine`=\d{' with `keep`=6' if needed == 6 else ''} needs at least {needed} clients a round for"
        rf" {type(rule).__name__}, and round 4 has 4\."
        " Raise `clients_per_round` or `num_clients`, or lower `num_byzantine`"
    )
    with pytest.raises(ValueError, match=message):
        step(rule, MODELS[:4])


def test_too_few_clients_lose_nothing():
    rule, module = KrumCallback(1), Classifier()
    with pytest.raises(ValueError, match="needs at least 5 clients a round"):
        trainer(rule=rule).fit(module, loader())
    assert torch.equal(flat(module), flat(Classifier()))


def test_buffers_of_chosen_clients_alone():
    _, module = train(Classifier(norm=True), rule=KrumCallback(0), rounds=1)
    _, average = train(Classifier(norm=True), rule=FedAvgCallback(), rounds=1)
    assert not torch.allclose(module.net[1].running_mean, average.net[1].running_mean)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrimmedMeanCallback(0.1), "`num_byzantine` must be a whole number of at least 0, got 0.1"),
        (lambda: KrumCallback(-1), "`num_byzantine` must be a whole number of at least 0, got -1"),
        (lambda: MultiKrumCallback(1, keep=0), "`keep` must be a whole number of at least 1, got 0"),
        (lambda: GeometricMedianCallback(smoothing=0), "`smoothing` must be a finite number above 0, got 0"),
        (lambda: GeometricMedianCallback(max_iterations=0), "`max_iterations` must be a whole number of at least 1"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()

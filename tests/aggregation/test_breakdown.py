"""The stated number of liars, whatever they send, moves no robust rule out of the honest clients' range."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from federations import Classifier, flat, loader, train, trainer
from lightning_fedhaw import (
    BitFlipChannel,
    CoordinateMedianCallback,
    FedAdpCallback,
    GeometricMedianCallback,
    KrumCallback,
    MultiKrumCallback,
    TrimmedMeanCallback,
)
from lightning_fedhaw.aggregation.robust import central_vector, geometric_median_weights, krum_scores
from lightning_fedhaw.extending import Channel, ClientVectors, Cohort, ParameterLayout
from lightning_fedhaw.server import Server

LARGEST = torch.finfo(torch.float32).max
SIZES = (1e3, 1e10, 1e20, 3e38, LARGEST)
P = 40
SERVER = Server(nn.Linear(P - 1, 1), ParameterLayout.of(nn.Linear(P - 1, 1)))
START = torch.linspace(-1, 1, P)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


def same(size, liars, generator):
    return torch.full((liars, P), size)


def opposed(size, liars, generator):
    signs = torch.tensor([1.0, -1.0]).repeat(liars)[:liars]
    return size * signs[:, None].expand(liars, P)


def scattered(size, liars, generator):
    return size * torch.randn(liars, P, generator=generator).sign()


def one_number(size, liars, generator):
    lies = torch.randn(liars, P, generator=generator)
    lies[:, 7] = size
    return lies


LIES = (same, opposed, scattered, one_number)

# For each rule: how to make it for f liars of K clients, and the largest f of eleven.
WITHIN_RANGE = {
    "median": (lambda f: CoordinateMedianCallback(), 5),
    "trimmed mean": (TrimmedMeanCallback, 5),
    "Krum": (KrumCallback, 4),
    "Multi-Krum": (MultiKrumCallback, 4),
}


def cohort(displacements, examples=None, start=START):
    clients = len(displacements)
    return Cohort(
        round=0,
        clients=torch.arange(clients),
        num_examples=torch.ones(clients, dtype=torch.int64) if examples is None else torch.tensor(examples),
        num_steps=torch.ones(clients, dtype=torch.int64),
        received=torch.ones(clients, dtype=torch.bool),
        start=start,
        vectors=ClientVectors(displacements, start),
    )


def federation_of_liars(lie, size, liars, seed, dtype=torch.float32):
    """Displacements of eleven clients, of which the first ones lie."""
    generator = torch.Generator().manual_seed(seed)
    displacements = torch.randn(11, P, generator=generator)
    displacements[:liars] = lie(size, liars, generator)
    return displacements.to(dtype)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(("make", "most"), WITHIN_RANGE.values(), ids=WITHIN_RANGE.keys())
def test_the_model_stays_in_the_honest_range(make, most, lie):
    for liars in {1, most}:
        for seed, size in enumerate(SIZES):
            displacements = federation_of_liars(lie, size, liars, seed)
            end = make(liars).step(cohort(displacements), {}, SERVER).parameters
            honest = START + displacements[liars:]
            assert torch.isfinite(end).all()
            assert (end >= honest.amin(0) - 1e-6).all(), (liars, size)
            assert (end <= honest.amax(0) + 1e-6).all(), (liars, size)


@pytest.mark.parametrize("lie", LIES)
def test_the_geometric_median_stays_within_its_bound(lie):
    for liars in (1, 5):
        share = liars / 11
        for seed, size in enumerate(SIZES):
            displacements = federation_of_liars(lie, size, liars, seed)
            step = GeometricMedianCallback().step(cohort(displacements), {}, SERVER)
            honest = START + displacements[liars:]
            farthest = (honest - honest.mean(0)).norm(dim=1).max()
            assert torch.isfinite(step.parameters).all()
            moved = (step.parameters - honest.mean(0)).norm()
            assert moved <= 2 * (1 - share) / (1 - 2 * share) * farthest, (liars, size)


def test_liars_with_few_examples_may_be_the_majority_for_the_geometric_median():
    examples = [1] * 6 + [10] * 5
    for size in SIZES:
        displacements = federation_of_liars(same, size, 6, 0)
        end = GeometricMedianCallback().step(cohort(displacements, examples), {}, SERVER).parameters
        honest = START + displacements[6:]
        share = 6 / 56
        farthest = (honest - honest.mean(0)).norm(dim=1).max()
        assert (end - honest.mean(0)).norm() <= 2 * (1 - share) / (1 - 2 * share) * farthest


def test_the_central_vector_by_hand():
    # On a line at 0, 1, 3, 4 and 100, where half of the equal weights is three of five. The distances to the third
    # nearest, oneself included, are 3, 2, 2, 3 and 97, and the first of equals counts.
    line = ClientVectors(torch.tensor([[0.0], [1.0], [3.0], [4.0], [100.0]], dtype=torch.float64))
    assert central_vector(line, torch.full((5,), 0.2, dtype=torch.float64)) == 1
    # With most of the weight, the last has it within a ball of no size.
    assert central_vector(line, torch.tensor([0.1, 0.1, 0.1, 0.1, 0.6], dtype=torch.float64)) == 4


def test_liars_of_different_sizes_do_not_hide_each_other():
    displacements = federation_of_liars(same, 3e38, 5, 0)
    for liar, size in enumerate((1e3, 1e10, 1e20, 1e30)):
        displacements[liar] = size
    end = GeometricMedianCallback().step(cohort(displacements), {}, SERVER).parameters
    honest = START + displacements[5:]
    assert (end - honest.mean(0)).norm() < 12 * (honest - honest.mean(0)).norm(dim=1).max()


def test_a_start_at_a_client_holds_nothing_back():
    # Each corner is as central as the others, and the first is the start. The others pull with two forces of 1/3 at a
    # right angle, more than its share of 1/3 can hold, so the median is the Fermat point: both are (3 - sqrt 3) / 6.
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    weights, iterations = geometric_median_weights(ClientVectors(triangle), third, 1e-6, 1e-4, 20)
    assert (weights @ triangle).tolist() == pytest.approx([(3 - 3**0.5) / 6] * 2, abs=1e-3)
    assert iterations < 20
    # With half of the weight at the first, it can.
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    weights, iterations = geometric_median_weights(ClientVectors(triangle), shares, 1e-6, 1e-4, 20)
    assert weights.tolist() == [1.0, 0.0, 0.0]
    assert iterations == 1


def test_numbers_that_float64_cannot_square():
    displacements = federation_of_liars(scattered, 1e3, 2, 0, torch.float64)
    displacements[0] = 1e200
    displacements[1] = torch.finfo(torch.float64).max
    vectors = ClientVectors(displacements)
    assert vectors.norms()[0] == pytest.approx(1e200 * P**0.5)
    assert vectors.distances(-displacements[0])[0] == pytest.approx(2e200 * P**0.5)
    groups = {"first": [slice(0, 4)], "rest": [slice(4, 8), slice(8, P)]}
    assert vectors.norms(groups)[:, 0].tolist() == pytest.approx([2e200, 6e200])
    scores = krum_scores(vectors, 2)
    assert set(scores.argsort()[-2:].tolist()) == {0, 1}
    start = START.double()
    for rule in (KrumCallback(2), MultiKrumCallback(2), GeometricMedianCallback(), TrimmedMeanCallback(2)):
        end = rule.step(cohort(displacements, start=start), {}, SERVER).parameters
        assert (end - start).abs().max() < 4
    rule = FedAdpCallback()
    step = rule.step(cohort(displacements, start=start), rule.init(start, torch.ones(11)), SERVER)
    assert step.weights.sum().item() == pytest.approx(1)


class Lies(Channel):
    """Replaces what the first clients send, as in a federation under attack."""

    def __init__(self, size, liars=1):
        super().__init__()
        self.size = size
        self.liars = liars

    def transmit(self, message, *, round_idx, client, seed):
        return torch.full_like(message, self.size) if client < self.liars else message


STORAGE = {
    "device": {},
    "host": {"storage": "host"},
    "bfloat16": {"storage_dtype": torch.bfloat16},
    "float64": {"storage_dtype": torch.float64},
    "vectorized": {"engine": "vectorized"},
    "two processes": {"devices": 2, "strategy": "federated_notebook", "reduction": "ordered"},
}
ROBUST = {
    "median": CoordinateMedianCallback,
    "trimmed mean": TrimmedMeanCallback,
    "Krum": KrumCallback,
    "Multi-Krum": MultiKrumCallback,
    "geometric median": GeometricMedianCallback,
}


def distance_moved(rule, size, **options):
    options = {"num_clients": 5, "client_eval": False, **options}
    _, module = train(rounds=1, rule=rule, callbacks=[Lies(size)], **options)
    assert torch.isfinite(flat(module)).all()
    return (flat(module) - flat(Classifier())).norm()


@pytest.mark.parametrize("options", STORAGE.values(), ids=STORAGE.keys())
def test_a_liar_in_a_federation_with_any_storage(options):
    rules = ROBUST if "devices" not in options else {"Krum": KrumCallback, "geometric median": GeometricMedianCallback}
    for name, make in rules.items():
        assert distance_moved(make(), 3e38, **options) < 2, name


def test_processes_agree_about_a_liar():
    def end(**options):
        options = {"num_clients": 5, "client_eval": False, "reduction": "ordered", **options}
        return flat(train(rounds=2, rule=GeometricMedianCallback(), callbacks=[Lies(3e38)], **options)[1])

    assert torch.equal(end(), end(devices=2, strategy="federated_notebook"))


def test_what_does_not_fit_into_the_storage_is_left_out():
    told = r"update of client 0 in round 0 does not fit into `storage_dtype`=torch.float16 .* and was left out"
    with pytest.warns(UserWarning, match=told):
        assert distance_moved(GeometricMedianCallback(), 1e10, storage_dtype=torch.float16) < 2
    with pytest.raises(FloatingPointError, match=r'does not fit .* and `on_nonfinite="raise"` ends the run'):
        distance_moved(GeometricMedianCallback(), 1e10, storage_dtype=torch.float16, on_nonfinite="raise")


@pytest.mark.filterwarnings("ignore:Client . returned non-finite")
def test_flipped_bits_do_not_end_a_geometric_median():
    runner = trainer(6, GeometricMedianCallback(), [BitFlipChannel(1e-4)], num_clients=5, client_eval=False)
    module = Classifier()
    runner.fit(module, loader())
    assert torch.isfinite(flat(module)).all()
    assert flat(module).abs().max() < 100

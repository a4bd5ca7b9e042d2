"""The formulas of diagnostics, against numbers that were worked by hand."""

from math import isnan, log, nan

import pytest
import torch

from lightning_fedhaw.diagnostics import (
    cohort_coherence,
    cosines,
    critical_round,
    label_mixture,
    label_similarities,
    layer_shares,
    shrinking_terms,
    symmetric_histogram,
)

UPDATES = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def test_cosines_and_coherence_of_three_updates():
    pairs = cosines(UPDATES @ UPDATES.T)
    assert pairs[0, 1] == 0
    assert pairs[0, 2].item() == pytest.approx(0.70710678)
    assert pairs[1, 2].item() == pytest.approx(0.70710678)
    assert cohort_coherence(pairs, WEIGHTS) == pytest.approx(0.35355339)
    assert cohort_coherence(pairs, WEIGHTS, printed=True) == pytest.approx(0.11785113)
    # The expansion it rests on: the squared norm of the mean is its diagonal part and the pairs.
    gram = UPDATES @ UPDATES.T
    products = WEIGHTS[:, None] * WEIGHTS * gram
    assert products.sum().item() == pytest.approx(1.7)
    assert products.diagonal().sum().item() == pytest.approx(0.9)


def test_an_update_of_zeros_has_no_direction():
    updates = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    pairs = cosines(updates @ updates.T)
    assert pairs[0].tolist() == [0, 0, 0]
    assert pairs[1, 2].item() == pytest.approx(1)


def test_tiny_updates_have_directions():
    updates = UPDATES * 1e-100
    assert cosines(updates @ updates.T)[1, 2].item() == pytest.approx(0.70710678)


def test_the_critical_round_is_the_first_whose_mean_is_not_positive():
    coherence = [0.3, 0.2, 0.1, 0.05, -0.1, -0.1, -0.1]
    # Means of three: 0.2, 0.117, 0.017, -0.05 around the rounds 1, 2, 3, 4.
    assert critical_round(coherence, window=3) == 4
    assert critical_round(coherence, window=1) == 4
    assert critical_round([0.3, nan, 0.1, nan, -0.5], window=3) == 2, "the mean of what was measured"
    assert critical_round([0.3, 0.2, 0.1], window=3) is None
    assert critical_round([-1.0], window=3) is None, "too few rounds for a mean"
    with pytest.raises(ValueError, match="`window` must be odd"):
        critical_round(coherence, window=4)


def test_the_terms_of_a_step_with_a_scale():
    start = torch.tensor([3.0, 4.0])
    average = torch.tensor([2.5, 4.2])
    terms = shrinking_terms(start.norm().item(), (average - start).norm().item(), 0.95)
    assert terms.regularization == pytest.approx(0.25)
    assert terms.optimization == pytest.approx(0.51159066)
    assert terms.ratio == pytest.approx(2.04636263)


@pytest.mark.parametrize("scale", [1.0, 1.2])
def test_the_ratio_has_no_meaning_where_nothing_shrinks(scale):
    assert isnan(shrinking_terms(5.0, 1.0, scale).ratio)
    assert isnan(shrinking_terms(0.0, 1.0, 0.9).ratio)


def test_similarities_of_labels():
    cohort = label_mixture(torch.tensor([[50, 50, 0], [0, 20, 80]]), torch.tensor([0.6, 0.4], dtype=torch.float64))
    assert cohort.tolist() == pytest.approx([0.3, 0.38, 0.32])
    similarities = label_similarities(cohort, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert similarities["cosine"] == pytest.approx(0.99484021)
    assert similarities["total_variation"] == pytest.approx(0.95333333)
    assert similarities["kl"] == pytest.approx(-0.00511955, abs=1e-8)
    apart = label_similarities(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert apart == {"cosine": 0, "total_variation": 0, "kl": -torch.inf, "js": pytest.approx(1 - log(2), rel=1e-6)}


def test_shares_of_layers():
    # Squares of two clients: 9 + 16 in the first layer, 0 + 75 in the second.
    distances = torch.tensor([[3.0, 4.0], [0.0, 75**0.5]])
    assert layer_shares(distances).tolist() == pytest.approx([0.25, 0.75])
    assert layer_shares(torch.zeros(2, 2)).tolist() == [0, 0]


def test_a_histogram_is_symmetric_and_leaves_out_what_is_not_finite():
    histogram = symmetric_histogram(torch.tensor([-3.0, 0.1, 0.2, 2.9, nan]), 3)
    assert histogram.limit == 3
    assert histogram.shares.tolist() == [0.25, 0.5, 0.25]
    assert symmetric_histogram(torch.zeros(4), 3).shares.tolist() == [0, 1, 0]
    assert symmetric_histogram(torch.tensor([nan]), 2).shares.tolist() == [0, 0]

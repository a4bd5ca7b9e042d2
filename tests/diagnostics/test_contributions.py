"""Contributions of clients: games worked by hand, and federations with bad clients."""

import itertools
import logging
from math import isnan, log, nan

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from federations import Classifier, samples, train, trainer, val_loader
from lightning_fedhaw import FederatedCallback, IndexPartitioner
from lightning_fedhaw.diagnostics import (
    Contributions,
    client_scores,
    coalition_weights,
    contribution_table,
    draw_contributions,
    leave_one_out,
    pearson,
    score_correlations,
    scores_of,
    separation,
    shapley_errors,
    shapley_values,
)
from lightning_fedhaw.plotting import RunHistory

THREE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def seeded():
    return torch.Generator().manual_seed(0)


def test_weights_of_a_coalition():
    assert coalition_weights(THREE, torch.tensor([True, True, False])).tolist() == pytest.approx([0.4, 0.6, 0])
    assert coalition_weights(THREE, torch.tensor([False] * 3)).tolist() == [0, 0, 0]


def test_leaving_one_out():
    # Models 1 and 3 of equal weights, and the loss of a model w is (w - 2)^2: 0 of both, and 1 of either.
    halves = torch.tensor([0.5, 0.5])
    positions = torch.tensor([1.0, 3.0])
    assert leave_one_out(lambda weights: float((weights @ positions - 2) ** 2), halves).tolist() == [1, 1]


def additive(gains):
    return lambda weights: 10.0 - float(gains[weights > 0].sum())


def test_shapley_values_of_a_game_without_interaction_are_the_gains():
    gains = torch.tensor([3.0, -1.0, 2.0])
    found = shapley_values(additive(gains), THREE, 4, seeded())
    assert found.values.tolist() == pytest.approx(gains.tolist())
    assert found.errors.tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert found.evaluations == 2 + 4 * 2


def interacting(weights):
    """Model ``sum w_k u_k`` of u = (0, 0), (2, 0), (0, 2), and half its squared distance to (0.6, 0.4)."""
    models = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    return 0.5 * float((weights @ models - torch.tensor([0.6, 0.4], dtype=torch.float64)).square().sum())


def test_shapley_values_of_all_orders():
    exact = torch.zeros(3, dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        members = torch.zeros(3, dtype=torch.bool)
        before = interacting(torch.zeros(3, dtype=torch.float64))
        for client in order:
            members[client] = True
            after = interacting(coalition_weights(THREE, members))
            exact[client] += (before - after) / 6
            before = after
    found = shapley_values(interacting, THREE, 600, seeded())
    assert (found.values - exact).abs().max() < 4 * found.errors.max()
    assert found.errors.max() < 0.1
    whole = interacting(torch.zeros(3, dtype=torch.float64)) - interacting(THREE)
    assert found.values.sum().item() == pytest.approx(whole)
    assert shapley_values(interacting, THREE, 1, seeded()).errors.isnan().all()


def test_an_order_is_cut_off_where_nothing_is_left_to_gain():
    def anybody(weights):
        return 0.0 if weights.sum() > 0 else 1.0

    found = shapley_values(anybody, THREE, 30, seeded(), tolerance=0.01)
    assert found.evaluations == 2 + 30
    assert found.values.sum().item() == pytest.approx(1)
    assert shapley_values(anybody, THREE, 30, seeded()).evaluations == 2 + 60


def test_correlations_and_separation():
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([1, 2, nan, 3], [3, 2, 100, 1]) == pytest.approx(-1)
    # Deviations (-1, 0, 1) and (0, -1, 1): 1 / 2.
    assert pearson([1, 2, 3], [2, 1, 3]) == pytest.approx(0.5)
    assert isnan(pearson([1, 2], [1, 1]))
    assert separation([0.1, 0.2, 0.9, 0.8], [True, True, False, False]) == 1
    assert separation([0.5, 0.5], [True, False]) == 0.5
    assert separation([0.1, nan, 0.9, 0.05], [True, True, False, False]) == 0.5
    assert isnan(separation([0.1, 0.2], [True, True]))


def with_wrong_labels(wrong, clients=5, each=24):
    """Equal clients, some of which have the labels of the next class."""
    x, y = samples(clients * each).tensors
    y = y.clone()
    for client in wrong:
        own = slice(client * each, (client + 1) * each)
        y[own] = (y[own] + 1) % 3
    indices = [list(range(client * each, (client + 1) * each)) for client in range(clients)]
    data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    return data, IndexPartitioner(indices)


@pytest.fixture(scope="module")
def noisy():
    data, partitioner = with_wrong_labels((1, 3))
    run = RunHistory()
    contributions = Contributions(2, samples=60, permutations=4)
    options = {"num_clients": 5, "alpha": None, "partitioner": partitioner, "storage": "device", "local_epochs": 3}
    trainer(4, None, [contributions, run], **options).fit(Classifier(), data, val_loader())
    return run


def test_clients_with_wrong_labels_have_the_lowest_scores(noisy):
    is_bad = [False, True, False, True, False]
    assert scores_of(noisy) == ["weight", "leave_one_out", "shapley"]
    assert separation(client_scores(noisy, "leave_one_out"), is_bad) == 1
    assert separation(client_scores(noisy, "shapley"), is_bad) == 1
    assert separation(client_scores(noisy), is_bad) == 0.5, "FedAvg's weights know nothing of labels"
    assert noisy.tables["diagnostics/contributions/shapley"].keys() == {1, 3}
    first = noisy.tables["diagnostics/contributions/shapley_error"]
    expected = (first[1].double().square() + first[3].double().square()).sqrt() / 2
    assert torch.allclose(shapley_errors(noisy), expected)


def test_the_table_and_the_correlations(noisy):
    noise = {"noise": [0.0, 1.0, 0.0, 1.0, 0.0]}
    columns, rows = contribution_table(noisy, noise)
    assert columns == [
        "client", "samples", "label_entropy", "noise", "weight", "leave_one_out", "shapley", "shapley_error",
    ]  # fmt: skip
    assert [row[0] for row in rows] == [0, 1, 2, 3, 4]
    assert all(0 < row[2] <= log(3) + 1e-9 for row in rows)
    correlations = score_correlations(noisy, noise)
    assert correlations["shapley"]["noise"] < -0.5
    assert isnan(correlations["shapley"]["samples"]), "all clients have equally many"
    with pytest.raises(ValueError, match=r"`quantities\['noise'\]` must be one number for each of 5 clients"):
        contribution_table(noisy, {"noise": [1.0]})


def test_the_picture(noisy):
    pytest.importorskip("matplotlib")
    figure = draw_contributions(noisy, "contributions.pdf")
    assert figure.axes[0].get_xlabel() == "mean weight"
    assert len(figure.axes) == 3


def test_a_score_that_was_not_measured():
    run = RunHistory()
    train(rounds=1, callbacks=[run])
    with pytest.raises(ValueError, match=r"`score` must be one that the run has kept \('weight'\), got 'shapley'"):
        client_scores(run, "shapley")


class Keep(FederatedCallback):
    def on_aggregation(self, trainer, pl_module, aggregated):
        self.start = aggregated.cohort.start.clone()
        self.updates = aggregated.cohort.vectors.displacements.gather()
        self.weights = aggregated.weights


def test_it_is_the_loss_of_the_mean_of_the_others():
    keep, run = Keep(), RunHistory()
    module = Classifier(dropout=0.4)
    train(module, val=val_loader(), rounds=1, callbacks=[keep, Contributions(samples=100), run], storage="device")
    x, y = samples(60, seed=1).tensors

    def loss(weights):
        nn.utils.vector_to_parameters(keep.start + weights.float() @ keep.updates, module.parameters())
        with torch.no_grad():
            return cross_entropy(module.eval().net(x), y).item()

    expected = leave_one_out(loss, keep.weights)
    assert run.tables["diagnostics/contributions/leave_one_out"][0].tolist() == pytest.approx(
        expected.tolist(), abs=1e-5
    )
    assert run.metrics[0]["diagnostics/contributions/loss"] == pytest.approx(loss(keep.weights), abs=1e-5)


def test_the_cost_and_what_is_refused(caplog):
    with caplog.at_level(logging.INFO):
        train(rounds=1, val=val_loader(), callbacks=[Contributions(permutations=3)], storage="device")
    lines = [record.getMessage() for record in caplog.records if "Contributions:" in record.getMessage()]
    # One of all, 5 for leaving out one of four, and two ends and three further losses for each of three orders.
    assert "at most 17 losses of 60 samples with 4 clients" in lines[0]
    with pytest.raises(ValueError, match="`Contributions` needs the update of each client"):
        train(val=val_loader(), callbacks=[Contributions()])
    with pytest.raises(ValueError, match="`Contributions` needs validation data, and there is none"):
        train(callbacks=[Contributions()], storage="device")

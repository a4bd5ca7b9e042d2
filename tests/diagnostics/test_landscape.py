"""The loss over the weights of three clients, and along lines."""

from math import isnan

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from federations import Classifier, samples, train, val_loader
from lightning_fedhaw import FederatedCallback, FixedSequenceSampler
from lightning_fedhaw.diagnostics import (
    Landscape,
    barycentric,
    draw_landscape,
    eigenvector_losses,
    loss_of_module,
    scale_losses,
    segment_losses,
    simplex_grid,
)
from lightning_fedhaw.plotting import RunHistory


def test_the_minimum_of_a_bowl():
    grid = simplex_grid(20)
    assert grid.shape == (231, 3)
    assert torch.allclose(grid.sum(1), torch.ones(231).double())
    models = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    losses = 0.5 * (grid @ models - torch.tensor([0.6, 0.4])).square().sum(1)
    assert grid[losses.argmin()].tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert losses.min().item() == pytest.approx(0, abs=1e-12)


def test_the_corners_of_the_triangle():
    corners = barycentric(torch.eye(3, dtype=torch.float64))
    assert corners.flatten().tolist() == pytest.approx([0, 0, 1, 0, 0.5, 0.75**0.5])
    assert barycentric(torch.tensor([0.5, 0.3, 0.2])).tolist() == pytest.approx([0.4, 0.1732051])


class Keep(FederatedCallback):
    def on_aggregation(self, trainer, pl_module, aggregated):
        self.models = aggregated.cohort.start + aggregated.cohort.vectors.displacements.gather()
        self.sizes = aggregated.cohort.num_examples


def test_it_is_the_loss_of_the_means():
    run, keep = RunHistory(), Keep()
    module = Classifier(dropout=0.4)
    observers = [Landscape(1, clients=[3, 0, 1], resolution=2, samples=100), keep, run]
    train(module, val=val_loader(), rounds=1, callbacks=observers, storage="device")
    x, y = samples(60, seed=1).tensors

    def loss(weights):
        vector = weights.float() @ keep.models[[3, 0, 1]]
        nn.utils.vector_to_parameters(vector, module.parameters())
        with torch.no_grad():
            return cross_entropy(module.eval().net(x), y).item()

    losses = run.tables["diagnostics/landscape/losses"][0]
    grid = simplex_grid(2)
    assert losses.tolist() == pytest.approx([loss(corners) for corners in grid], abs=1e-5)
    row = run.metrics[0]
    assert row["diagnostics/landscape/minimum"] == pytest.approx(losses.min().item(), abs=1e-6)
    shares = keep.sizes[[3, 0, 1]] / keep.sizes[[3, 0, 1]].sum()
    assert row["diagnostics/landscape/fedavg"] == pytest.approx(loss(shares), abs=1e-5)
    assert row["diagnostics/landscape/rule"] == pytest.approx(loss(shares), abs=1e-5)
    points = run.tables["diagnostics/landscape/points"][0]
    assert points[2].tolist() == grid[losses.argmin()].tolist()
    assert run.tables["diagnostics/landscape/clients"][0].tolist() == [3, 0, 1]


def test_the_picture_has_the_way_of_the_minimum():
    pytest.importorskip("matplotlib")
    run = RunHistory()
    train(val=val_loader(), rounds=2, callbacks=[Landscape(1, resolution=4), run], storage="device")
    axes = draw_landscape(run, "landscape.pdf").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["FedAvg", "rule", "minimum"]
    assert len(axes.get_lines()[0].get_xdata()) == 2
    assert len(draw_landscape(run, "landscape.png", round_idx=0).axes[0].get_lines()[0].get_xdata()) == 1


def test_a_round_without_one_of_the_three_is_left_out():
    run = RunHistory()
    sampler = FixedSequenceSampler([[0, 1, 2], [1, 2, 3]])
    observers = [Landscape(1, clients=[0, 1, 2], resolution=1), run]
    train(val=val_loader(), rounds=2, callbacks=observers, storage="device", sampler=sampler)
    assert [isnan(value) for value in run.curve("diagnostics/landscape/minimum")] == [False, True]


def test_what_is_refused():
    with pytest.raises(ValueError, match="`Landscape` needs three clients a round, and 2 take part"):
        train(val=val_loader(), callbacks=[Landscape()], storage="device", clients_per_round=2)
    with pytest.raises(ValueError, match="`Landscape` needs the update of each client"):
        train(val=val_loader(), callbacks=[Landscape()])
    with pytest.raises(ValueError, match="`clients` must be numbers below 4, that of the clients, got"):
        train(val=val_loader(), callbacks=[Landscape(clients=[1, 2, 4])], storage="device")
    with pytest.raises(ValueError, match="`Landscape` needs validation data"):
        train(callbacks=[Landscape()], storage="device")


def test_lines_through_a_trained_module():
    runner, module = train(Classifier(norm=True, dropout=0.3), val=val_loader(), rounds=1)
    runner.save_checkpoint("first.ckpt")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    runner, other = train(Classifier(norm=True, dropout=0.3), val=val_loader(), rounds=3)
    runner.save_checkpoint("second.ckpt")
    loss = loss_of_module(module, val_loader())
    x, y = samples(60, seed=1).tensors

    def at(which):
        with torch.no_grad():
            return cross_entropy(which.eval().net(x), y).item()

    first, middle, second = segment_losses(loss, "first.ckpt", "second.ckpt", [0, 0.5, 1])
    assert first == pytest.approx(at(module), abs=1e-5)
    assert second == pytest.approx(at(other), abs=1e-5)
    assert middle < max(first, second) + 0.5
    assert scale_losses(loss, [1.0])[0] == pytest.approx(first, abs=1e-6)
    assert scale_losses(loss, [0.0])[0] == pytest.approx(torch.log(torch.tensor(3.0)).item(), abs=1e-6)
    # Along the top eigenvector the loss bends by the largest eigenvalue, which no other direction exceeds.
    step = 0.03
    low, center, high = eigenvector_losses(loss, [-step, 0, step])
    vector = loss.server.parameters()
    top = loss.top_eigenvector(vector)
    bend = torch.dot(top, loss.hessian_product(vector, top)).item()
    assert center == pytest.approx(first, abs=1e-6)
    assert (low - 2 * center + high) / step**2 == pytest.approx(bend, rel=0.15)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(ValueError, match="'first.ckpt' is not a checkpoint of this module: it has no"):
        segment_losses(loss_of_module(nn_module(), val_loader()), "first.ckpt", "second.ckpt", [0])


def nn_module():
    module = Classifier()
    module.head = nn.Linear(3, 3)
    return module

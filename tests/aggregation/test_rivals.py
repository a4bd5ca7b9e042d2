"""FedExP, FedAWA and FedVG: rounds worked by hand, and derivatives that autograd confirms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from federations import Classifier, loader, samples, trainer
from lightning_fedhaw import FedAWACallback, FederatedDataModule, FedExPCallback, FedVGCallback
from lightning_fedhaw.aggregation.fedawa import model_distances, share_gradient
from lightning_fedhaw.aggregation.fedvg import flatness
from lightning_fedhaw.extending import ClientVectors, Cohort, ParameterLayout

LAYOUT = ParameterLayout.of(nn.Linear(1, 1).double())


class SquaredDistance:
    """A server whose loss at ``v`` is half the mean of a batch, which is 1, 2, 3, times the square of ``v``."""

    layout = LAYOUT
    seed = 0
    proxy_dataset = range(3)
    broken = False

    def proxy_batch(self, index):
        return index.double() + 1

    def loss(self, vector, batch, batch_idx=0):
        if self.broken:
            return (vector * math.nan).sum()
        return (batch.mean() * vector.square()).sum() / 2


def cohort(displacements, start=(0.0, 0.0), sizes=None):
    start = torch.tensor(start, dtype=torch.float64)
    matrix = torch.tensor(displacements, dtype=torch.float64)
    count = len(matrix)
    return Cohort(
        round=0,
        clients=torch.arange(count),
        num_examples=torch.tensor(sizes or [10] * count),
        num_steps=torch.ones(count, dtype=torch.int64),
        received=torch.ones(count, dtype=torch.bool),
        start=start,
        vectors=ClientVectors(matrix, start),
    )


def close(found, *expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)


# ---------------------------------------------------------------------- FedExP


@pytest.mark.parametrize(
    ("moves", "eps", "eta"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], 0.0, 1.0),  # mean square 1, |d|^2 = 1/2: exactly 1
        ([[1.0, 0.0], [-0.9, 0.0]], 0.0, 181.0),  # 0.905 / (2 * 0.0025)
        ([[1.0, 0.0], [-0.9, 0.0]], 1e-3, 0.905 / 0.007),
        ([[1.0, 0.0], [1.0, 0.0]], 0.0, 1.0),  # 1/2, raised to 1
        ([[1.0, 0.0], [-1.0, 0.0]], 0.0, 1.0),  # the mean is zero
        ([[0.0, 0.0], [0.0, 0.0]], 0.0, 1.0),
    ],
)
def test_the_step_of_fedexp(moves, eps, eta):
    end = FedExPCallback(eps, weighting="uniform").step(cohort(moves, (1.0, 2.0)), {}, SquaredDistance())
    assert end.metrics["server_step"] == pytest.approx(eta)
    mean = torch.tensor(moves, dtype=torch.float64).mean(0)
    close(end.parameters, *(torch.tensor([1.0, 2.0]) + eta * mean).tolist())


def test_fedexp_weighs_squares_and_mean_by_examples():
    # Shares 1/4 and 3/4: d = (1, -1.5), |d|^2 = 3.25; the mean square is 16 / 4 + 3 * 4 / 4 = 7.
    end = FedExPCallback(0.0).step(cohort([[4.0, 0.0], [0.0, -2.0]], sizes=[10, 30]), {}, SquaredDistance())
    assert end.metrics["server_step"] == pytest.approx(7 / 6.5)
    close(end.parameters, 7 / 6.5, -1.5 * 7 / 6.5)


# ---------------------------------------------------------------------- FedAWA


def test_the_derivative_of_fedawa_is_that_of_its_loss():
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(6, generator=draw, dtype=torch.float64)
    moves = torch.randn(4, 6, generator=draw, dtype=torch.float64)
    logits = torch.tensor([0.1, -0.3, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    shares = torch.softmax(logits, 0)
    models = start + moves
    cosines = torch.nn.functional.cosine_similarity(models, start[None])
    loss = (shares * (1 - cosines)).sum() + (shares * (moves - shares @ moves).norm(dim=1)).sum()
    (expected,) = torch.autograd.grad(loss, logits)
    shares = shares.detach()
    distances = model_distances(ClientVectors(moves, start), start)
    close(distances, *(1 - cosines).tolist())
    found = share_gradient(ClientVectors(moves), shares, distances)
    close(shares * (found - (shares * found).sum()), *expected.tolist())


def test_a_step_of_fedawa_by_hand():
    # From zero, cosines are undefined and distances 1. Shares 1/2, d = (2, 0), (0, 0): the mean is (1, 0), r = 1, 1.
    # The pull is sum s (d - m) / r = (1, 0) / 2 - (1, 0) / 2 = 0, so the loss falls equally: the weights stay.
    rule = FedAWACallback(1.0, optimizer=torch.optim.SGD)
    end = rule.step(cohort([[2.0, 0.0], [0.0, 0.0]]), rule.init(torch.zeros(2), torch.tensor([1, 1])), None)
    close(end.weights, 0.5, 0.5)
    # Three on a line, at 0, 0 and 3: m = 1, r = 1, 1, 2; the pull is (-1 - 1 + 1) / 3 = -1/3.
    # g = r - d pull = 1, 1, 3, its mean 5/3; the logits move by -g_k / 3 + 5/9 = 2/9, 2/9, -4/9.
    end = rule.step(cohort([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]]), {"logits": torch.zeros(3).double()}, None)
    close(end.state["logits"], 2 / 9, 2 / 9, -4 / 9)
    last = math.exp(-4 / 9) / (2 * math.exp(2 / 9) + math.exp(-4 / 9))
    close(end.parameters, 3 * last, 0.0)


def test_a_step_of_adam_moves_each_logit_by_the_rate():
    rule = FedAWACallback(0.25)
    end = rule.step(cohort([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]]), {"logits": torch.zeros(3).double()}, None)
    torch.testing.assert_close(end.state["logits"], torch.tensor([0.25, 0.25, -0.25]).double(), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------- FedVG


def test_a_round_of_fedvg_by_hand():
    # The batch is (1, 2, 3), its mean 2: the gradient at v is 2 v. Models (1, 0) and (1, 2): norms 2 and 2 + 4.
    moves = [[1.0, 0.0], [1.0, 2.0]]
    end = FedVGCallback().step(cohort(moves, sizes=[10, 30]), {}, SquaredDistance())
    close(end.weights, 0.75, 0.25)
    close(end.parameters, 1.0, 0.5)
    assert end.metrics["gradient_norm/min"] == 2.0
    assert end.metrics["gradient_norm/max"] == 6.0
    mixed = FedVGCallback(examples=0.5).step(cohort(moves, sizes=[10, 30]), {}, SquaredDistance())
    close(mixed.weights, 0.5, 0.5)


def test_the_batches_of_fedvg_change_nothing():
    moves = [[1.0, 0.0], [1.0, 2.0]]
    end = FedVGCallback(batch_size=2).step(cohort(moves), {}, SquaredDistance())
    close(end.weights, 0.75, 0.25)


def test_fedvg_leaves_out_gradients_that_are_not_finite():
    close(flatness(torch.tensor([1.0, math.nan, 3.0])), 0.75, 0.0, 0.25)
    server = SquaredDistance()
    server.broken = True
    with pytest.warns(UserWarning, match=r"no client whose gradient .* round 0: the round is FedAvg's"):
        end = FedVGCallback().step(cohort([[1.0, 0.0], [1.0, 2.0]], sizes=[10, 30]), {}, server)
    close(end.weights, 0.25, 0.75)


def test_fedvg_needs_proxy_data_and_trains_with_it():
    with pytest.raises(ValueError, match="`FedVGCallback` works with data of the server's own, and there is none"):
        trainer(rule=FedVGCallback(), rounds=1).fit(Classifier(), loader())
    fitted = trainer(rule=FedVGCallback(), rounds=2)
    fitted.fit(Classifier(), datamodule=FederatedDataModule(samples(), proxy=16, batch_size=8))
    assert fitted.callback_metrics["weight/max"] < 1


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: FedExPCallback(eps=-1.0), "`eps`"),
        (lambda: FedExPCallback(weighting="batches"), "`weighting`"),
        (lambda: FedAWACallback(lr=0.0), "`lr`"),
        (lambda: FedAWACallback(server_epochs=-1), "`server_epochs`"),
        (lambda: FedVGCallback(order=0.5), "`order`"),
        (lambda: FedVGCallback(examples=1.5), "`examples`"),
        (lambda: FedVGCallback(batch_size=0), "`batch_size`"),
    ],
)
def test_the_constructors_name_what_is_wrong(make, names):
    with pytest.raises(ValueError, match=names):
        make()

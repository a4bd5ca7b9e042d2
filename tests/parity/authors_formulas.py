"""FedHAW once more, written from its formulas in NumPy: what the package is compared with.

A. Nakai-Kasai and T. Wadayama, arXiv 2605.00458; the order of the steps is the one of ``train_fedhaw`` in
github.com/a-nakai-k/FedHAW. Nothing here imports ``lightning_fedhaw``: local training is a loop of torch autograd over
one flat vector, the server is a few lines of NumPy. In float64 throughout.

Beyond the authors' code there are the exact softmax Jacobian (``exact``), the unweighted pseudo-gradient (``plain``),
and cohorts A (the last) and B (this one) that need not be everyone: softmaxes are taken over the cohort, and a client
outside A keeps its logit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

FEATURES, HIDDEN, CLASSES = 6, 5, 3
SHAPES = ((HIDDEN, FEATURES), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,))

Array = np.ndarray


@dataclass(frozen=True)
class Formulas:
    """Which of the formulas."""

    mu: float
    lr_gamma: float
    lr_lambda: float
    exact: bool = False
    new_gamma: bool = True
    plain: bool = False
    proximal: float = 0.0


@dataclass(frozen=True)
class Trace:
    """Model, log-scale and logits after a round."""

    w: Array
    gamma: float
    lam: Array


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def hyper_step(
    w: Array, before: Array, now: Array, lam: Array, a: list[int], b: list[int], gamma: float, f: Formulas
) -> tuple[float, Array]:
    """The new log-scale and logits; ``before`` [A, P] are the models that built ``w``, ``now`` [B, P] this round's."""
    r = w - softmax(lam[b]) @ now
    gamma_new = gamma - f.lr_gamma * (1.0 if f.plain else np.exp(gamma)) / f.mu * (r @ w)
    seen = gamma_new if f.new_gamma else gamma
    factor = np.exp(seen if f.plain else 2 * seen) / f.mu
    s = softmax(lam[a])
    pulls = before @ r
    gradient = s * (pulls - s @ pulls) if f.exact else s * (1 - s) * pulls
    lam_new = lam.copy()
    lam_new[a] -= f.lr_lambda * factor * gradient
    return gamma_new, lam_new


def play(
    w: Array,
    sizes: Sequence[int],
    cohorts: Sequence[list[int]],
    train: Callable[[Array, int, int], Array],
    formulas: Formulas,
) -> list[Trace]:
    """All rounds. ``train(w, client, round)`` is a client's local work."""
    gamma, lam = 0.0, np.log(np.asarray(sizes) / np.sum(sizes))
    last: list[int] | None = None
    before = np.empty((0, w.size))
    traces = []
    for t, cohort in enumerate(cohorts):
        now = np.stack([train(w, k, t) for k in cohort])
        if last is not None:
            gamma, lam = hyper_step(w, before, now, lam, last, cohort, gamma, formulas)
        w = np.exp(gamma) * (softmax(lam[cohort]) @ now)
        before, last = now, cohort
        traces.append(Trace(w, gamma, lam.copy()))
    return traces


def loss(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of a tanh network, from its flat parameters."""
    w1, b1, w2, b2 = (
        part.reshape(shape)
        for part, shape in zip(torch.split(w, [int(np.prod(s)) for s in SHAPES]), SHAPES, strict=True)
    )
    scores = torch.tanh(x @ w1.T + b1) @ w2.T + b2
    scores = scores - scores.max(1, keepdim=True).values
    return (torch.log(torch.exp(scores).sum(1)) - scores[torch.arange(len(y)), y]).mean()


def local_sgd(
    w: Array, x: Array, y: Array, orders: Sequence[Array], batch_size: int, mu: float, proximal: float = 0.0
) -> Array:
    """Plain minibatch SGD; ``orders`` holds the samples of each local epoch in the order they are visited.

    FedProx+HAW adds ``proximal / 2 |point - w|^2`` to the loss; the displacement holds its pull, and so does what the
    server makes of it.
    """
    point = torch.tensor(w)
    for order in orders:
        for i in range(0, len(order), batch_size):
            batch = order[i : i + batch_size]
            point = point.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(point, torch.tensor(x[batch]), torch.tensor(y[batch])), point)
            point = point - mu * (gradient + proximal * (point - torch.tensor(w)))
    return point.detach().numpy()

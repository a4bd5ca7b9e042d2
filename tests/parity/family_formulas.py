"""FedAdp, FedHyper-G, FedLWS and FedLAW once more, in NumPy, from their formulas and notes on the authors' code.

Nothing here imports ``lightning_fedhaw``. A server is ``server(w [P], models [K, P], cohort, sizes [K])`` and gives the
next model and what it has learned, by the name under which the package logs it. Servers keep their state themselves, so
each is made anew for a run. In float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from parity.authors_formulas import SHAPES, Array, loss, softmax

Server = Callable[[Array, Array, Sequence[int], Array], tuple[Array, dict[str, float]]]


def fedavg() -> Server:
    return lambda w, models, cohort, sizes: (sizes / sizes.sum() @ models, {})


def fedadp(alpha: float = 5.0) -> Server:
    """The angle is averaged over the rounds that the client took part in; under full participation, over all rounds."""
    angles: dict[int, list[float]] = {}

    def aggregate(w: Array, models: Array, cohort: Sequence[int], sizes: Array) -> tuple[Array, dict[str, float]]:
        q = w - models
        mean = sizes / sizes.sum() @ q
        cosines = q @ mean / (np.linalg.norm(q, axis=1) * np.linalg.norm(mean) + 1e-12)
        for client, angle in zip(cohort, np.arccos(np.clip(cosines, -1, 1)), strict=True):
            angles.setdefault(client, []).append(angle)
        smooth = np.array([np.mean(angles[client]) for client in cohort])
        f = alpha * (1 - np.exp(-np.exp(-alpha * (smooth - 1))))
        psi = sizes * np.exp(f) / np.sum(sizes * np.exp(f))
        return psi @ models, {"weight/max": psi.max()}

    return aggregate


def fedhyper(low: float = 0.2, high: float = 5.0) -> Server:
    """FedHyper-G as in the code: unweighted, and ``-0.8 <= alpha - 1 <= 4``."""
    alpha, last = 1.0, None

    def aggregate(w: Array, models: Array, cohort: Sequence[int], sizes: Array) -> tuple[Array, dict[str, float]]:
        nonlocal alpha, last
        delta = np.mean(w - models, axis=0)
        if last is not None:
            alpha = min(max(alpha + delta @ last, low), high)
        last = delta
        return w - alpha * delta, {"alpha": alpha}

    return aggregate


def fedlws(beta: float, tau_min: float = 0.0, tau_max: float = np.inf) -> Server:
    """A layer ends with its bias, as in the code; in this network that is the same as weight and bias of a module."""
    bounds = np.cumsum([0, *(int(np.prod(shape)) for shape in SHAPES)])[::2]

    def aggregate(w: Array, models: Array, cohort: Sequence[int], sizes: Array) -> tuple[Array, dict[str, float]]:
        new, factors = sizes / sizes.sum() @ models, []
        for begin, end in pairwise(bounds):
            layer = slice(begin, end)
            deltas = models[:, layer] - w[layer]
            tau = beta * np.mean(np.linalg.norm(deltas - deltas.mean(0), axis=1))
            size = np.linalg.norm(w[layer])
            factors.append(size / (size + min(max(tau, tau_min), tau_max) * np.linalg.norm(new[layer] - w[layer])))
            new[layer] *= factors[-1]
        return new, {"shrink/min": min(factors), "shrink/mean": float(np.mean(factors))}

    return aggregate


def fedlaw(
    proxy: tuple[Array, Array],
    epochs: int,
    lr: float,
    momentum: float = 0.0,
    halved_every: int | None = None,
) -> Server:
    """The exponential base, learned by SGD on the whole proxy set; gradients of scale and logits by the chain rule."""
    x, y = (torch.tensor(part) for part in proxy)

    def gradient(w: Array) -> Array:
        point = torch.tensor(w, requires_grad=True)
        return torch.autograd.grad(loss(point, x, y), point)[0].numpy()

    def aggregate(w: Array, models: Array, cohort: Sequence[int], sizes: Array) -> tuple[Array, dict[str, float]]:
        logits, log_scale = np.log(sizes / sizes.sum()), 0.0
        velocity: Any = 0.0
        for epoch in range(epochs):
            s, c = softmax(logits), np.exp(log_scale)
            mean = s @ models
            g = gradient(c * mean)
            slope = np.append(c * s * (models @ g - mean @ g), c * mean @ g)
            velocity = momentum * velocity + slope
            rate = lr if halved_every is None else lr * 0.5 ** (epoch // halved_every)
            logits, log_scale = logits - rate * velocity[:-1], log_scale - rate * velocity[-1]
        s, c = softmax(logits), float(np.exp(log_scale))
        return c * s @ models, {"scale": c, "weight/min": s.min(), "weight/max": s.max()}

    return aggregate

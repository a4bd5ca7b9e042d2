"""Coherence of the labels: whether a cohort has the same labels as all clients together.

Shapes: N clients exist, K of them are in the cohort, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fedhaw.diagnostics.base import Diagnostic
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.observation import Aggregated


def label_mixture(histograms: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of label distributions.

    Args:
        histograms: ``[K, C]``, samples or shares of each class.
        weights: ``[K]``, summing to one.

    Returns:
        ``[C]``, summing to one.
    """
    counts = histograms.double()
    return weights.double() @ (counts / counts.sum(1, keepdim=True))


def label_similarities(cohort: Tensor, everyone: Tensor) -> dict[str, float]:
    """Compute four similarities of two label distributions; each is larger the more alike they are.

    The paper does not say which one its heterogeneity coherence is.

    Args:
        cohort: ``[C]``, summing to one.
        everyone: ``[C]``, summing to one.

    Returns:
        ``cosine``; ``total_variation``, one minus that distance; ``kl``, minus the Kullback-Leibler divergence in nats
        of the cohort's distribution from everyone's; and ``js``, one minus the Jensen-Shannon divergence in nats.
    """
    cosine = cohort @ everyone / (cohort.norm() * everyone.norm())
    middle = (cohort + everyone) / 2
    jensen_shannon = (_divergence(cohort, middle) + _divergence(everyone, middle)) / 2
    return {
        "cosine": float(cosine),
        "total_variation": 1 - float((cohort - everyone).abs().sum()) / 2,
        "kl": -_divergence(cohort, everyone),
        "js": 1 - jensen_shannon,
    }


def _divergence(first: Tensor, second: Tensor) -> float:
    """Compute the Kullback-Leibler divergence of a distribution ``[C]`` from a second one, in nats."""
    # x log x is 0 at 0.
    return float((torch.xlogy(first, first) - torch.xlogy(first, second)).sum())


class LabelCoherence(Diagnostic):
    """Measures how similar the labels of a round's cohort, with its weights, are to those of all clients.

    It logs ``diagnostics/label_coherence/`` and ``cosine``, ``total_variation``, ``kl`` and ``js``.

    Args:
        every_n_rounds: It measures after every n-th round.
    """

    def __init__(self, every_n_rounds: int = 1) -> None:
        super().__init__(every_n_rounds)
        self._counts = torch.empty(0, 0)  # [N, C]

    def check(self, federation: Federation) -> None:
        """Read the labels of all clients, and refuse data that shows none."""
        histogram = federation.data.class_histogram()
        if histogram is None:
            raise ValueError(
                f"`{type(self).__name__}` compares the labels of clients, and the data shows none: give the trainer or"
                f" the data module `labels=`, or remove `{type(self).__name__}`."
            )
        self._counts = histogram.counts

    def measure(self, aggregated: Aggregated) -> None:
        """Compare the cohort's labels with those of all clients."""
        cohort = label_mixture(self._counts[aggregated.cohort.clients], aggregated.weights)
        sizes = self._counts.sum(1).double()
        everyone = label_mixture(self._counts, sizes / sizes.sum())
        for name, value in label_similarities(cohort, everyone).items():
            aggregated.log(f"label_coherence/{name}", value)

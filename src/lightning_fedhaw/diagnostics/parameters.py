"""The histogram of the global model's parameters: how they spread, and how many are nearly zero.

Z. Li, T. Lin, X. Shang, C. Wu: Revisiting Weighted Aggregation in Federated Learning with Neural Networks.
arXiv:2302.10911, section 4.

Shapes: P trainable parameters that are shared, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.diagnostics.base import Diagnostic
from lightning_fedhaw.federation.observation import Aggregated


@dataclass(frozen=True)
class Histogram:
    """The histogram of some numbers in bins of equal width, symmetric around zero.

    Attributes:
        shares: ``[B]`` float64, the share of the numbers in each bin; they sum to one.
        limit: The bins reach from ``-limit`` to ``limit``.
    """

    shares: Tensor
    limit: float


def symmetric_histogram(values: Tensor, bins: int) -> Histogram:
    """Compute the histogram of numbers ``[P]`` up to the largest magnitude; infinite ones and NaN are left out.

    Args:
        values: The numbers.
        bins: The number of bins.
    """
    # On the CPU, where counts are the same in every run.
    finite = values.detach().float().cpu()
    finite = finite[finite.isfinite()]
    limit = 1.0
    if finite.numel() and finite.abs().max() > 0:
        limit = float(finite.abs().max())
    counts = torch.histc(finite, bins, -limit, limit).double()
    return Histogram(counts / max(finite.numel(), 1), limit)


class ParameterHistogram(Diagnostic):
    """Measures how the parameters of the new global model are spread.

    After ``diagnostics/parameters/`` it logs their ``mean``, their standard deviation ``std`` and the ``largest``
    magnitude. It keeps the shares of bins of equal width in the table ``diagnostics/parameters/shares``, and the two
    ends of the bins in ``diagnostics/parameters/ends``. Parameters that stay with the clients do not count.

    Args:
        every_n_rounds: It measures after every n-th round.
        bins: The number of bins, an odd one to have a bin around zero.
    """

    def __init__(self, every_n_rounds: int = 1, *, bins: int = 101) -> None:
        super().__init__(every_n_rounds)
        self.bins = arguments.integer("bins", bins, minimum=1)

    def measure(self, aggregated: Aggregated) -> None:
        """Compute the histogram of the new global model."""
        values = aggregated.server.parameters().detach()
        histogram = symmetric_histogram(values, self.bins)
        # In float64 without a copy of all parameters in float64.
        mean = float(values.mean(dtype=torch.float64))
        mean_square = float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2 / values.numel()
        aggregated.log("parameters/mean", mean)
        aggregated.log("parameters/std", max(mean_square - mean**2, 0.0) ** 0.5)
        aggregated.log("parameters/largest", float(values.abs().max()))
        aggregated.keep("parameters/shares", histogram.shares)
        aggregated.keep("parameters/ends", torch.tensor([-histogram.limit, histogram.limit]))

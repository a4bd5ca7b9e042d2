"""Coherence of the clients' updates: whether they point in one direction.

Z. Li, T. Lin, X. Shang, C. Wu: Revisiting Weighted Aggregation in Federated Learning with Neural Networks.
arXiv:2302.10911, section 5.

Shapes: K clients are in the cohort, C classes in the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.diagnostics.base import Diagnostic, check_single_updates
from lightning_fedhaw.federation.federation import Federation
from lightning_fedhaw.federation.observation import Aggregated

MOST_PAIRED = 100
"""Clients of a cohort up to which the cosines of all pairs are kept: a checkpoint grows with their square."""


def cosines(gram: Tensor) -> Tensor:
    """Compute the cosines of all pairs of vectors.

    Args:
        gram: ``[K, K]``, their inner products.

    Returns:
        ``[K, K]``; 0 for a vector without a direction, whose length is 0.
    """
    lengths = gram.diagonal().clamp(min=0).sqrt()
    # Divided one after the other, because the product of two lengths may vanish where neither does.
    by_rows = torch.where(lengths[:, None] > 0, gram / lengths[:, None], 0.0)
    return torch.where(lengths > 0, by_rows / lengths, 0.0).clamp(-1, 1)


def cohort_coherence(pairs: Tensor, weights: Tensor, *, printed: bool = False) -> float:
    """Compute the coherence of a cohort: the sum of ``s_i s_j cos(q_i, q_j)`` over all pairs of different clients.

    Args:
        pairs: ``[K, K]``, the cosines.
        weights: ``[K]``, the weights s, which sum to one.
        printed: Whether it is divided by K, as the paper's Definition 5.1 is printed. Its Figure 5 shows larger values
            than that allows.

    Returns:
        The coherence; NaN of a single client, which has no pair.
    """
    if len(weights) < 2:
        return nan
    products = weights[:, None] * weights * pairs
    total = products.sum() - products.diagonal().sum()
    if printed:
        total = total / len(weights)
    return float(total)


def critical_round(coherence: Sequence[float], window: int = 5) -> int | None:
    """Find the critical round, from which on the clients' updates no longer point in one direction.

    Args:
        coherence: The coherence over rounds; NaN where it was not measured.
        window: The measurements in the mean by which the curve is smoothed; an odd number.

    Returns:
        The first round, from 0, around which the mean is at most 0; ``None`` if there is none.

    Raises:
        ValueError: If the window is not an odd number of at least 1.
    """
    window = arguments.integer("window", window, minimum=1)
    if window % 2 == 0:
        raise arguments.invalid("window", "odd, so that a mean is of the round in its middle", window)
    rounds = [index for index, value in enumerate(coherence) if not isnan(value)]
    for first in range(len(rounds) - window + 1):
        inside = rounds[first : first + window]
        if sum(coherence[index] for index in inside) <= 0:
            return inside[window // 2]
    return None


class Coherence(Diagnostic):
    """Measures whether the clients' updates point in one direction.

    It logs ``diagnostics/coherence`` and keeps the cosines of all pairs ``[K, K]`` of a cohort of up to 100 clients as
    the table ``diagnostics/cosines``, with the clients' numbers in ``diagnostics/cosines_of``.

    Args:
        every_n_rounds: It measures after every n-th round.
        printed: Whether the coherence is divided by the number of clients, as the paper prints it; its figures are only
            consistent with the form without this division.
    """

    def __init__(self, every_n_rounds: int = 1, *, printed: bool = False) -> None:
        super().__init__(every_n_rounds)
        self.printed = arguments.flag("printed", printed)

    def check(self, federation: Federation) -> None:
        """Refuse a federation that keeps only the sum of the updates, or in which one client takes part in a round."""
        name = type(self).__name__
        check_single_updates(name, federation)
        if len(federation.cohort(0)) < 2:
            raise ValueError(
                f"`{name}` compares the updates of a round's clients, and one takes part: raise `clients_per_round` or"
                f" `num_clients`, or remove `{name}`."
            )

    def measure(self, aggregated: Aggregated) -> None:
        """Compute the cosines of all pairs, and log the coherence."""
        pairs = cosines(aggregated.cohort.vectors.displacements.gram())
        aggregated.log("coherence", cohort_coherence(pairs, aggregated.weights, printed=self.printed))
        if len(pairs) <= MOST_PAIRED:
            aggregated.keep("cosines", pairs)
            aggregated.keep("cosines_of", aggregated.cohort.clients)

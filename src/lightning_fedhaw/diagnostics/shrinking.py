"""Global weight shrinking: the two terms of a step with a scale, and their ratio.

With a scale c, the server's step from the model w leads to ``w - c q - (1 - c) w``, where q is the mean of the clients'
steps. The last term pulls the model towards zero as weight decay does.

Z. Li, T. Lin, X. Shang, C. Wu: Revisiting Weighted Aggregation in Federated Learning with Neural Networks.
arXiv:2302.10911, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from lightning_fedhaw.diagnostics.base import Diagnostic
from lightning_fedhaw.federation.observation import Aggregated


@dataclass(frozen=True)
class ShrinkingTerms:
    """The terms of a step with a scale.

    Attributes:
        optimization: ``c |q|``, the norm of the optimization term.
        regularization: ``(1 - c) |w|``, that of the pseudo-gradient of the scale.
        ratio: The first divided by the second; NaN where nothing shrinks, with c of at least 1 or a model of zeros.
    """

    optimization: float
    regularization: float
    ratio: float


def shrinking_terms(model_norm: float, mean_update_norm: float, scale: float) -> ShrinkingTerms:
    """Compute the terms of a step with a scale.

    Args:
        model_norm: The norm of the model that was broadcast.
        mean_update_norm: The norm of the clients' mean update.
        scale: The scale c.
    """
    optimization = scale * mean_update_norm
    regularization = (1 - scale) * model_norm
    ratio = nan
    if regularization > 0:
        ratio = optimization / regularization
    return ShrinkingTerms(optimization, regularization, ratio)


class Shrinking(Diagnostic):
    """Measures how far a round moves the global model, and how much of this is the rule's scale.

    The scale is the one that the rule logs as ``scale`` (FedHAW, FedLAW and others), and 1 for a rule that logs none.
    After ``diagnostics/shrinking/`` it logs:

    - ``model_norm`` of the new global model, ``update_norm`` of its change in the round, and ``mean_update_norm`` of
      the weighted mean of the clients' updates;
    - ``optimization`` and ``regularization``, the norms of the two terms of :class:`ShrinkingTerms`, and their
      ``ratio``, which is NaN where the scale is at least 1.

    Args:
        every_n_rounds: It measures after every n-th round.
    """

    def measure(self, aggregated: Aggregated) -> None:
        """Compute the norms."""
        start = aggregated.cohort.start
        mean_update_norm = _norm(aggregated.mean_update())
        terms = shrinking_terms(_norm(start), mean_update_norm, aggregated.output.metrics.get("scale", 1.0))
        new = aggregated.server.parameters()
        aggregated.log("shrinking/model_norm", _norm(new))
        aggregated.log("shrinking/update_norm", _norm(new - start))
        aggregated.log("shrinking/mean_update_norm", mean_update_norm)
        for name, value in vars(terms).items():
            aggregated.log(f"shrinking/{name}", value)


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))

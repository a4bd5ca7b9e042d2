"""Learned client weighting: weights by a power of the number of examples, whose exponent is learned.

K. Rush, Z. Charles, Z. Garrett: Federated Automatic Differentiation. arXiv:2301.07806, section 6.

With ``n`` [K], the clients' numbers of examples, and their displacements ``d`` [K, P]::

    p = softmax(q log n)                       proportional to n^q: q = 0 is uniform weighting, q = 1 by examples
    w <- w + sum_k p_k d_k
    dw / dq = sum_k p_k (log n_k - sum_j p_j log n_j) d_k

``q`` is a smooth function of the number that is stepped (``link``), which the paper leaves open.

Shapes: K clients are in the cohort, P trainable parameters.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.factories import OptimizerFactory
from lightning_fedhaw.aggregation.learned import Bounds, Learned, LearningRule, LinkName
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.probe import Probe
from lightning_fedhaw.rule import RuleOutput, ServerView, State


class LearnedWeightingCallback(LearningRule):
    """Average the local models with weights ``n_k^q`` and learn the exponent ``q`` by the gradient of a probe.

    Args:
        exponent: The exponent before the first round: 1 weighs by examples, 0 uniformly.
        link: What is stepped: ``"identity"``: the exponent itself. ``"sigmoid"``: its logit, which keeps it between 0
            and 1. ``"softplus"``: the inverse of softplus, which keeps it above 0. ``"exp"``: its logarithm.
        probe: The second cohort whose gradient it is learned by. Default: ``Probe()``, training clients that are drawn
            afresh and answer in the same communication round.
        hyper_optimizer: Makes the optimizer of the exponent from ``(parameters, lr=...)``.
        hyper_lr: Its learning rate.
        bounds: The smallest and largest exponent.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``learned``: the exponent, as it is stepped, and the memory of its optimizer; ``tangents``: the
            derivative [P] of the last step.

    Raises:
        ValueError: If an argument is not one of the allowed values, or the exponent not one of the link's.
        TypeError: If ``hyper_optimizer`` makes no optimizer that steps on a given gradient.

    Example:
        >>> rule = LearnedWeightingCallback(exponent=0.5, link="sigmoid", hyper_lr=0.05)
    """

    key = "LearnedWeightingCallback"

    prog_bar = ("learned/exponent",)

    def __init__(
        self,
        exponent: float = 1.0,
        *,
        link: LinkName = "identity",
        probe: Probe | None = None,
        hyper_optimizer: OptimizerFactory = torch.optim.Adam,
        hyper_lr: float = 0.01,
        bounds: Bounds | None = None,
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.exponent = arguments.number("exponent", exponent)
        self.link: LinkName = arguments.choice("link", link, LinkName)
        self.probe = arguments.optional(arguments.instance, "probe", probe, Probe, example='Probe("validation")')
        if self.probe is None:
            self.probe = Probe()
        self.learned = Learned(
            {"exponent": self.exponent},
            hyper_optimizer=hyper_optimizer,
            hyper_lr=hyper_lr,
            bounds=None if bounds is None else {"exponent": bounds},
            links={"exponent": self.link},
        )

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Average the local models, and keep the derivative in the exponent."""
        exponent = self.learned.values(state["learned"])["exponent"]
        logarithms = cohort.num_examples.double().log()  # [K]
        scores = exponent * logarithms
        if cohort.inverse_probabilities is not None:
            scores = scores + cohort.inverse_probabilities.log()
        # Sums to one without a power that could overflow.
        weights = torch.softmax(scores, 0)  # [K]
        slopes = weights * (logarithms - weights.dot(logarithms))  # [K]
        new_state = {
            "learned": state["learned"],
            "tangents": {"exponent": cohort.vectors.displacements.weighted_sum(slopes).to(cohort.start)},
        }
        metrics = self.learned.metrics(state["learned"])
        metrics["weight/effective_clients"] = (1 / weights.square().sum()).item()
        return RuleOutput(cohort.vectors.weighted_sum(weights), new_state, weights, metrics)

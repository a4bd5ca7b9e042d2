"""A learned client rate: the derivative of the round's result in it is carried through the clients' local steps.

K. Rush, Z. Charles, Z. Garrett: Federated Automatic Differentiation. arXiv:2301.07806, forward mode.

With ``b`` a factor on the clients' learning rates, ``w_k(b)`` [P] the model of client k after its local steps, and
``G`` [P] the gradient of the probe's loss at the model that a round has made::

    w      <- sum_k p_k w_k(b)
    dL/db  =  <G, sum_k p_k dw_k/db>

FedHyper's SL (Z. Wang and others, ICLR 2024) approximates this by ``<G', sum_k p_k (w_k - w)>``, with the next round's
pseudo-gradient as ``G'``: the derivative of a single step of plain gradient descent, where ``w_k - w`` is ``b``
times its derivative.

Shapes: K clients are in the cohort, P trainable parameters.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import Weighting, unnormalized_client_weight
from lightning_fedhaw.aggregation.factories import OptimizerFactory
from lightning_fedhaw.aggregation.learned import Bounds, Learned, LearningRule, LinkName
from lightning_fedhaw.aggregation.shared_rate import SharedRate
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.probe import Probe
from lightning_fedhaw.rule import LocalLRScale, RuleOutput, ServerView, State
from lightning_fedhaw.vectors.layout import ParameterLayout


class LearnedClientRateCallback(LearningRule):
    """Average the local models, and learn a factor on the clients' learning rates by exact differentiation.

    Clients carry the derivative through their local steps and send it with their update. A local step takes about
    three times as long; memory does not grow with the number of steps.

    Args:
        factor: The factor on the rates of the clients' optimizer, before the first round.
        link: What is stepped: ``"exp"``: the factor's logarithm. ``"identity"``: the factor itself. ``"softplus"`` and
            ``"sigmoid"``: the inverses of these, which keep it above 0, and between 0 and 1.
        weighting: Weights of the average: by ``"examples"``, or ``"uniform"``.
        probe: The second cohort whose gradient it is learned by. Default: ``Probe()``, training clients that are drawn
            afresh and answer in the same communication round.
        hyper_optimizer: Makes the optimizer of what is stepped from ``(parameters, lr=...)``.
        hyper_lr: Its learning rate.
        bounds: The smallest and largest factor.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``learned``: the factor, as it is stepped, and the memory of its optimizer; ``tangents``: the
            derivative [P] of the last round's result.

    Raises:
        ValueError: If an argument is not one of the allowed values, or the factor not one of the link's; when a ``fit``
            begins, if no derivative can be carried through the clients' training.
        TypeError: If ``hyper_optimizer`` makes no optimizer that steps on a given gradient.

    Example:
        >>> rule = LearnedClientRateCallback(hyper_lr=0.1, bounds=(0.1, 10.0))
    """

    key = "LearnedClientRateCallback"

    prog_bar = ("learned/factor",)

    needs_rate_tangents = True

    takes_substitutes = False

    def __init__(
        self,
        factor: float = 1.0,
        *,
        link: LinkName = "exp",
        weighting: Weighting = "examples",
        probe: Probe | None = None,
        hyper_optimizer: OptimizerFactory = torch.optim.Adam,
        hyper_lr: float = 0.05,
        bounds: Bounds | None = None,
        **federation: Any,
    ) -> None:
        super().__init__(**federation)
        self.factor = arguments.number("factor", factor, minimum=0)
        self.link: LinkName = arguments.choice("link", link, LinkName)
        self.weighting: Weighting = arguments.choice("weighting", weighting, Weighting)
        self.probe = arguments.optional(arguments.instance, "probe", probe, Probe, example='Probe("validation")')
        if self.probe is None:
            self.probe = Probe()
        self.learned = Learned(
            {"factor": self.factor},
            hyper_optimizer=hyper_optimizer,
            hyper_lr=hyper_lr,
            bounds=None if bounds is None else {"factor": bounds},
            links={"factor": self.link},
            domains={"factor": (0.0, float("inf"))},
        )

    def unnormalized_weight(self, update: ClientUpdate) -> float:
        """Return a client's weight before normalization."""
        return unnormalized_client_weight(update, self.weighting)

    def local_lr_scale(self, state: State, layout: ParameterLayout) -> LocalLRScale:
        """Return the factor on the clients' rates."""
        return SharedRate(self.learned.values(state["learned"])["factor"])

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Average the local models, and keep the derivative in the factor."""
        weights = self.cohort_weights(cohort)  # [K]
        assert cohort.rate_tangents is not None
        tangent = cohort.rate_tangents.weighted_sum(weights).to(cohort.start)  # [P]
        new_state = {"learned": state["learned"], "tangents": {"factor": tangent}}
        metrics = self.learned.metrics(state["learned"])
        return RuleOutput(cohort.vectors.weighted_sum(weights), new_state, weights, metrics)

    def divergence_hint(self) -> str:
        """Return the factor, and the arguments that bound it."""
        factor = self.learned.values(self.state.get("learned", {}))["factor"]
        return (
            f" The factor on the clients' learning rates is {factor:.3g}: bound it by `bounds=`, or lower `hyper_lr`."
        )

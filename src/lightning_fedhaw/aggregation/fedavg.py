"""FedAvg: average the local models by their number of training examples.

H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas: Communication-Efficient Learning of Deep Networks
from Decentralized Data. AISTATS 2017, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.notes import add_note
from lightning_fedhaw.options import repr_settings
from lightning_fedhaw.rule import RuleOutput, ServerView, State

Weighting = Literal["examples", "batches", "uniform"]

Weights = Iterable[float] | Mapping[int, float] | Callable[[ClientUpdate], float]
"""Weights of the user's own: one number per client, a mapping from client to number, or a function of an update."""

NO_WEIGHT = (
    "`weights` gives 0 to every client whose update was received in this round. Give one of them a weight above 0, or"
    " leave clients without a weight out of the rounds by `sampler=`."
)
"""The note to the error of a round without any weight."""

LONGEST_LIST = 4
"""The number of weights up to which the start-up block shows them."""


class FedAvgCallback(AggregationRule):
    """Average the local models: ``w <- sum_k p_k w_k`` with ``p_k = n_k / sum_j n_j`` over the received updates.

    Args:
        weighting: ``"examples"``: by the number of training examples, as published. ``"batches"``: by
            the number of batches in a pass over them, as FedHAW's authors do for FedProx. ``"uniform"``: equal weights.
        weights: Weights of your own instead of ``weighting``: one number per client, a mapping from client to number,
            or a function that is given a :class:`~lightning_fedhaw.extending.ClientUpdate` and returns a number. They
            are normalized over the received updates.
        federation: The arguments of :class:`~lightning_fedhaw.FederationOptions`.

    Raises:
        ValueError: If ``weighting`` is unknown; if a weight is negative or not finite, or all of them are zero; if both
            arguments are given; when ``fit`` begins, if a client has no weight, or there are more weights than clients.

    Example:
        >>> rule = FedAvgCallback(weights={0: 0.4, 1: 0.3, 2: 0.3})
    """

    key = "FedAvgCallback"

    def __init__(self, weighting: Weighting = "examples", *, weights: Weights | None = None, **federation: Any) -> None:
        super().__init__(**federation)
        hint = "For numbers of your own give `weights=`."
        self.weighting: Weighting = arguments.choice("weighting", weighting, Weighting, hint=hint)
        self.weights = arguments.optional(_checked_weights, "weights", weights)
        if self.weights is not None and self.weighting != "examples":
            raise ValueError(f"`weights` replaces `weighting`, got both (`weighting={weighting!r}`). Give one of them.")

    def unnormalized_weight(self, update: ClientUpdate) -> float:
        """Return a client's weight before normalization; a subclass may override it."""
        if callable(self.weights):
            return self.weights(update)
        if self.weights is not None:
            return self.weights[update.client]
        if self.weighting == "examples":
            return float(update.example_weight)
        if self.weighting == "batches":
            return float(update.num_batches)
        return 1.0

    def describe(self) -> str:
        """Return the rule and its weights, for the start-up block."""
        if self.weights is None:
            return repr_settings(self)
        shown = None
        if not callable(self.weights):
            numbers = [f"{self.weights[client]:.6g}" for client in sorted(self.weights)]
            shown = f"({', '.join(numbers)})"
            if len(numbers) > LONGEST_LIST:
                shown = f"of {len(numbers)} clients"
        return repr_settings(self, "weighting", weights=shown)

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Check that there is one weight for each client; there is no state."""
        if self.weights is not None and not callable(self.weights):
            clients = set(range(len(num_examples)))
            if set(self.weights) != clients:
                raise ValueError(_mismatch(self.weights, clients))
        return {}

    def step(self, cohort: Cohort, state: State, server: ServerView) -> RuleOutput:
        """Average the local models."""
        try:
            weights = self.cohort_weights(cohort)  # [K]
        except ZeroDivisionError as error:
            if self.weights is not None:
                add_note(error, NO_WEIGHT)
            raise
        return RuleOutput(parameters=cohort.vectors.weighted_sum(weights), state=state, weights=weights)


def _checked_weights(name: str, weights: Weights) -> dict[int, float] | Callable[[ClientUpdate], float]:
    """Return weights as a mapping from client to number, or the function as it is.

    Raises:
        ValueError: If a weight is negative or not finite, if all are zero, or if they are of another form.
    """
    if callable(weights):
        return weights
    allowed = "finite numbers of at least 0, one per client and not all 0; or a function of a `ClientUpdate`"
    if isinstance(weights, Mapping):
        clients = arguments.integers(name, list(weights), minimum=0, allowed="a mapping from client numbers to numbers")
        numbers = arguments.numbers(name, list(weights.values()), allowed=allowed)
    else:
        numbers = arguments.numbers(name, weights, allowed=allowed)
        clients = list(range(len(numbers)))
    if not numbers.sum() > 0:
        raise arguments.invalid(name, allowed, weights)
    return dict(zip(clients, numbers.tolist(), strict=True))


def _mismatch(weights: Mapping[int, float], clients: set[int]) -> str:
    """Say which clients lack a weight, or which weights lack a client."""
    missing = sorted(clients - set(weights))
    problem = f"one for client {max(weights)}"
    if missing:
        problem = f"none for client {missing[0]}"
    return (
        f"`weights` needs one number for each of the {len(clients)} clients, 0 to {len(clients) - 1}, got"
        f" {len(weights)} and {problem}. A weight of 0 leaves a client out."
    )

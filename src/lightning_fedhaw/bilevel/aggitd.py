"""AggITD: hypergradients by iterative differentiation that is aggregated along the lower rounds.

P. Xiao, K. Ji: Communication-Efficient Federated Hypergradient Computation via Aggregated Iterative Differentiation.
ICML 2023. The text could not be had, and its authors published no code: this is a reconstruction from the abstract,
which is checked on quadratics, where it agrees with iterative differentiation.

With lower rounds ``j = 0 .. N-1`` from ``y_0``, rate ``l``, and means over the clients of each round::

    z <- grad_y f(y_Q)                     in round Q, drawn uniformly from 0 .. N-1
    z <- (I - l H(y_j)) z                  in each later round j
    h = grad_x f(y_N) - l N J(y_N) z       its mean over Q is iterative differentiation's sum, near the lower minimum

or, with ``q="sum"``, the sum itself: ``z <- (I - l H(y_j)) z + grad_y f(y_j)`` in every round, and ``h`` without ``N``.
The vector rides along with the lower variables, so second derivatives take no round of their own.

Shapes: P lower variables, U upper variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.bilevel.base import BilevelRule, LowerSteps
from lightning_fedhaw.bilevel.estimates import multiplied
from lightning_fedhaw.bilevel.rounds import OuterRound, Progress
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.inquiry import Answer, Answers, Inquiry, LocalProblem
from lightning_fedhaw.rule import ServerView, State
from lightning_fedhaw.streams import stream

StartOfProduct = Literal["random", "sum"]


class AggITDCallback(BilevelRule):
    """Train upper variables by hypergradients that are computed along the rounds of lower training.

    An outer step takes ``lower_rounds + 1`` communication rounds, and ``lower_rounds`` more with ``lower="svrg"``.

    Args:
        upper: The names of the upper variables: of a submodule, of a parameter, or patterns such as ``"net.0.*"``.
        lower_rounds: Lower rounds in each outer step.
        q: ``"random"``: the vector starts in a lower round that is drawn in each outer step, and the estimate is
            multiplied by the number of rounds. ``"sum"``: it starts in every round, which is the same without the draw.
        lower: Whether clients train as they do without upper variables (``"sgd"``), or take steps that are corrected by
            the mean of all clients' gradients (``"svrg"``).
        settings: The arguments of :class:`~lightning_fedhaw.bilevel.BilevelRule`, and those of
            :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``upper``: the upper variables [U]; ``vector``: the vector z [P]; the position in the outer step.

    Raises:
        ValueError: If an argument is not one of the allowed values.
        FloatingPointError: If the vector explodes, because the rate of the lower steps is too large.

    Example:
        >>> rule = AggITDCallback("hyper", lower_rounds=5, upper_lr=0.02, clip=10.0)
    """

    key = "AggITDCallback"
    structure = ("lower_rounds", "q", "lower", "upper_steps")

    def __init__(
        self,
        upper: str | Sequence[str],
        *,
        lower_rounds: int = 5,
        q: StartOfProduct = "random",
        lower: LowerSteps = "sgd",
        **settings: Any,
    ) -> None:
        super().__init__(upper, **settings)
        self.lower_rounds = arguments.integer("lower_rounds", lower_rounds, minimum=1)
        self.q: StartOfProduct = arguments.choice("q", q, StartOfProduct)
        self.lower: LowerSteps = arguments.choice("lower", lower, LowerSteps)

    @property
    def clients_train(self) -> bool:  # type: ignore[override]
        """Whether lower steps are those of the clients' optimizer."""
        return self.lower == "sgd"

    def outer_rounds(self) -> Sequence[OuterRound]:
        """List the lower rounds, and the rounds of the upper step."""
        rounds: list[OuterRound] = []
        for number in range(self.lower_rounds):
            rounds += self.lower_rounds_of(self.lower, self._rider(number))
        multiple = self.lower_rounds if self.q == "random" else 1
        return [*rounds, *self.upper_rounds(multiple)]

    def _rider(self, number: int) -> OuterRound:
        """Return what the clients of one lower round are asked for in addition to their training."""

        def ask(state: State, server: ServerView) -> Inquiry | None:
            start = 0
            if self.q == "random":
                start = drawn_start(server.seed, state["outer_step"], self.lower_rounds)
            if number < start:
                return None
            if number == start:
                return Inquiry("upper gradient", _upper_gradient, {"vector": server.layout})
            return Inquiry(
                "vector of second derivatives",
                partial(self._multiply, self.rate_of(state)),
                {"vector": server.layout},
                sent={"vector": (state["vector"], server.layout)},
                products=1,
            )

        return OuterRound(ask, self._keep_vector)

    def _multiply(self, rate: float, problem: LocalProblem, sent: Mapping[str, Tensor]) -> Answer:
        vector = multiplied(problem, sent["vector"], rate)
        if self.q == "random":
            return {"vector": vector}
        gradient = problem.upper_gradients().lower
        return {"vector": vector + gradient, "added norm": float(torch.linalg.vector_norm(gradient))}

    def _keep_vector(self, cohort: Cohort, answers: Answers | None, state: State) -> Progress:
        """Keep the mean of the clients' vectors."""
        if answers is None or "vector" not in answers.vectors:
            return Progress({"vector": None, "first_norm": None})
        vector = answers.vectors["vector"]
        norm = float(torch.linalg.vector_norm(vector))
        # The gradient may be zero or tiny in the first round, and longer where it is added later.
        first_norm = max(state.get("first_norm") or norm, answers.numbers.get("added norm", 0.0))
        vector = self.checked_vector(vector, first_norm)
        return Progress({"vector": vector, "first_norm": first_norm}, metrics={"bilevel/vector_norm": norm})

    def upper_step(
        self, state: State, direction: Tensor, upper_loss: float, rows: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Progress:
        """Step the upper variables, and forget the vector."""
        progress = super().upper_step(state, direction, upper_loss, rows)
        return Progress({**progress.state, "vector": None, "first_norm": None}, metrics=progress.metrics)


def drawn_start(seed: int, outer_step: int, lower_rounds: int) -> int:
    """Draw the lower round, from 0, in which the vector of an outer step starts."""
    generator = stream(seed, "AggITD", "outer step", outer_step)
    return int(torch.randint(lower_rounds, (), generator=generator))


def _upper_gradient(problem: LocalProblem, sent: Mapping[str, Tensor]) -> Answer:
    return {"vector": problem.upper_gradients().lower}

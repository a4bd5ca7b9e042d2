"""SimFBO: lower variables, upper variables and the vector of the linear system in a single loop.

Y. Yang, P. Xiao, K. Ji: SimFBO: Towards Simple, Flexible and Communication-efficient Federated Bilevel Learning.
NeurIPS 2023, Algorithm 1. With means over the clients of a round, each of which takes local steps with the same rates::

    y <- y - b_y grad_y g,   v <- project(v - b_v (H v - grad_y f)),   x <- x - b_x (grad_x f - J v)

Shapes: P lower variables, U upper variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.bilevel.base import BilevelRule
from lightning_fedhaw.bilevel.estimates import single_loop_directions, within
from lightning_fedhaw.bilevel.rounds import OuterRound, Progress
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.inquiry import Answer, Answers, Inquiry, LocalProblem
from lightning_fedhaw.rule import ServerView, State


class SimFBOCallback(BilevelRule):
    """Train lower and upper variables at once: every communication round is an outer step.

    Clients do not train with their optimizer: they send directions, which are exact means over their samples.

    Args:
        upper: The names of the upper variables: of a submodule, of a parameter, or patterns such as ``"net.0.*"``.
        single_loop_steps: Local steps of each client in a round.
        vector_lr: The rate of the vector. Default: that of the lower variables.
        radius: The largest norm of the vector; ``None`` for no bound.
        settings: The arguments of :class:`~lightning_fedhaw.bilevel.BilevelRule`, and those of
            :class:`~lightning_fedhaw.FederationOptions`; ``upper_steps`` has to be 1.

    Attributes:
        state: ``upper``: the upper variables [U]; ``vector``: the vector v [P].

    Raises:
        ValueError: If an argument is not one of the allowed values.
        FloatingPointError: If the vector explodes, because its rate is too large.

    Example:
        >>> rule = SimFBOCallback("hyper", lower_lr=0.1, upper_lr=0.01, radius=10.0)
    """

    key = "SimFBOCallback"

    def __init__(
        self,
        upper: str | Sequence[str],
        *,
        single_loop_steps: int = 1,
        vector_lr: float | None = None,
        radius: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(upper, **settings)
        self.single_loop_steps = arguments.integer("single_loop_steps", single_loop_steps, minimum=1)
        self.vector_lr = arguments.optional(arguments.number, "vector_lr", vector_lr, above=0)
        self.radius = arguments.optional(arguments.number, "radius", radius, above=0)
        if self.upper_steps != 1:
            raise ValueError(
                f"`upper_steps`={self.upper_steps} is for rules whose upper step follows lower rounds. Give"
                " `single_loop_steps`, in which clients step all variables."
            )

    def init(self, start: Tensor, num_examples: Tensor) -> State:
        """Read the upper variables from the module, and start the vector at zero."""
        return {**super().init(start, num_examples), "vector": torch.zeros_like(start)}

    def outer_rounds(self) -> Sequence[OuterRound]:
        """List the only round."""
        return [OuterRound(self._ask, self._finish)]

    def _rates(self) -> tuple[float, float]:
        """Return the rates of the lower variables and of the vector."""
        return self._rate, self.vector_lr or self._rate

    def _ask(self, state: State, server: ServerView) -> Inquiry:
        def answer(problem: LocalProblem, sent: Mapping[str, Tensor]) -> Answer:
            return self._directions(problem, sent["vector"])

        layouts = self.layouts_of_direction()
        return Inquiry(
            "directions",
            answer,
            {"lower": server.layout, "vector": server.layout, **layouts["vectors"]},
            placed=layouts["placed"],
            sent={"vector": (state["vector"], server.layout)},
            replaces_training=True,
            products=2 * self.single_loop_steps,
        )

    def _directions(self, problem: LocalProblem, vector: Tensor) -> Answer:
        """Take a client's local steps, and return the sums of its directions and the first upper loss."""
        lower_rate, vector_rate = self._rates()
        local_vector = vector
        sums = [torch.zeros_like(problem.lower), torch.zeros_like(vector), torch.zeros_like(problem.upper)]
        losses: list[float] = []
        for _ in range(self.single_loop_steps):
            *directions, loss = single_loop_directions(problem, local_vector)
            for total, direction in zip(sums, directions, strict=True):
                total += direction
            lower, change, upper = directions
            local_vector = within(local_vector - vector_rate * change, self.radius)
            problem = problem.at(problem.lower - lower_rate * lower, problem.upper - self.upper_lr * upper)
            losses.append(loss)
        lower_sum, vector_sum, upper_sum = sums
        return {"lower": lower_sum, "vector": vector_sum, **self.direction_and_loss(upper_sum, losses[0])}

    def _finish(self, cohort: Cohort, answers: Answers | None, state: State) -> Progress:
        assert answers is not None
        lower_rate, vector_rate = self._rates()
        lower = cohort.start - lower_rate * answers.vectors["lower"].to(cohort.start)
        vector = state["vector"] - vector_rate * answers.vectors["vector"].to(cohort.start)
        norm = float(torch.linalg.vector_norm(vector))
        first_norm = state.get("first_norm") or norm
        vector = self.checked_vector(within(vector, self.radius), first_norm)
        progress = self.upper_step(state, self.direction_of(answers), answers.numbers["upper loss"], answers.rows)
        metrics = {**progress.metrics, "bilevel/vector_norm": norm}
        return Progress({**progress.state, "vector": vector, "first_norm": first_norm}, lower, metrics)

"""FedNest: hypergradients by a Neumann series, each factor of which is a communication round.

D. A. Tarzanagh, M. Li, C. Thrampoulidis, S. Oymak: FedNest: Federated Bilevel, Minimax, and Compositional Optimization.
ICML 2022, Algorithms 1 to 3 and Table 2. With rate ``l`` and means over the clients of each round::

    p_0 = grad_y f,   p_n = (I - l H) p_(n-1),   h = grad_x f - l J sum of p_0 .. p_N

Shapes: P lower variables, U upper variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.bilevel.base import BilevelRule, LowerSteps
from lightning_fedhaw.bilevel.estimates import local_hypergradient, multiplied, neumann_sum, within
from lightning_fedhaw.bilevel.rounds import OuterRound, Progress
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.inquiry import Answer, Answers, Inquiry, LocalProblem
from lightning_fedhaw.rule import ServerView, State

Variant = Literal["FedNest", "LFedNest", "FedNest_SGD", "LFedNest_SVRG"]
Series = Literal["average", "own"]

LOWER_STEPS: dict[Variant, LowerSteps] = {
    "FedNest": "svrg",
    "LFedNest": "sgd",
    "FedNest_SGD": "sgd",
    "LFedNest_SVRG": "svrg",
}


class FedNestCallback(BilevelRule):
    """Train upper variables by hypergradients of a Neumann series.

    An outer step takes ``lower_rounds`` lower updates of one round (``"LFedNest"``, ``"FedNest_SGD"``) or two rounds
    each, and then one round (``"LFedNest"``, ``"LFedNest_SVRG"``) or ``terms + 2`` rounds, and one more with
    ``upper_steps`` above 1, which the paper always counts.

    Args:
        upper: The names of the upper variables: of a submodule, of a parameter, or patterns such as ``"net.0.*"``.
        lower_rounds: Lower updates in each outer step.
        terms: The highest power of the series.
        variant: ``"FedNest"``: lower steps are corrected by the mean of all clients' gradients (SVRG), and the series
            is that of the mean Hessian. ``"FedNest_SGD"``: the same with plain lower training. ``"LFedNest"``: plain
            lower training, and each client's own hypergradient, whose mean is not the hypergradient of the mean.
            ``"LFedNest_SVRG"``: the same with corrected lower steps.
        series: Whose Hessian multiplies the vector: ``"average"``: the mean of all clients', in one round a power, as
            in the paper. ``"own"``: each client's own, in one round for all powers; their mean is then the mean of the
            clients' series, as in the authors' code.
        scales_series: Whether the series is multiplied by the rate, as in the paper. The authors' code for class
            imbalance leaves the factor out.
        settings: The arguments of :class:`~lightning_fedhaw.bilevel.BilevelRule`, and those of
            :class:`~lightning_fedhaw.FederationOptions`.

    Attributes:
        state: ``upper``: the upper variables [U]; ``power`` and ``vector``: the last power and the sum of the series
            [P]; the position in the outer step.

    Raises:
        ValueError: If an argument is not one of the allowed values.
        FloatingPointError: If the series explodes, because the rate of the lower steps is too large.

    Example:
        >>> rule = FedNestCallback("net.0", lower_rounds=1, terms=5, variant="FedNest")
    """

    key = "FedNestCallback"
    structure = ("lower_rounds", "terms", "variant", "series", "upper_steps")

    def __init__(
        self,
        upper: str | Sequence[str],
        *,
        lower_rounds: int = 1,
        terms: int = 5,
        variant: Variant = "FedNest",
        series: Series = "average",
        scales_series: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(upper, **settings)
        self.lower_rounds = arguments.integer("lower_rounds", lower_rounds, minimum=1)
        self.terms = arguments.integer("terms", terms, minimum=0)
        self.variant: Variant = arguments.choice("variant", variant, Variant)
        self.series: Series = arguments.choice("series", series, Series)
        self.scales_series = arguments.flag("scales_series", scales_series)

    @property
    def clients_train(self) -> bool:  # type: ignore[override]
        """Whether lower steps are those of the clients' optimizer."""
        return LOWER_STEPS[self.variant] == "sgd"

    def outer_rounds(self) -> Sequence[OuterRound]:
        """List the lower updates, the powers of the series, and the rounds of the upper step."""
        rounds: list[OuterRound] = []
        for _ in range(self.lower_rounds):
            rounds += self.lower_rounds_of(LOWER_STEPS[self.variant])
        if self.variant.startswith("L"):
            return [*rounds, OuterRound(self._ask_local, self._finish_local)]
        rounds.append(OuterRound(self._ask_upper_gradient, self._start_series))
        if self.series == "own":
            rounds.append(OuterRound(self._ask_own_series, self._keep_series))
        else:
            rounds += [OuterRound(self._ask_power, self._add_power)] * self.terms
        multiple = 1 if self.scales_series else None
        return [*rounds, *self.upper_rounds(multiple)]

    # ------------------------------------------------------------------ the series of the mean Hessian

    def _ask_upper_gradient(self, state: State, server: ServerView) -> Inquiry:
        def answer(problem: LocalProblem, sent: Mapping[str, Tensor]) -> Answer:
            return {"power": problem.upper_gradients().lower}

        return Inquiry("upper gradient", answer, {"power": server.layout}, replaces_training=True)

    def _start_series(self, cohort: Cohort, answers: Answers | None, state: State) -> Progress:
        assert answers is not None
        power = answers.vectors["power"]
        norm = float(torch.linalg.vector_norm(power))
        power = self.checked_vector(power, norm)
        return Progress({"power": power, "vector": power, "first_norm": norm})

    def _ask_power(self, state: State, server: ServerView) -> Inquiry:
        rate = self.rate_of(state)

        def answer(problem: LocalProblem, sent: Mapping[str, Tensor]) -> Answer:
            return {"power": multiplied(problem, sent["power"], rate)}

        return self._inquiry_of_series("power of the Neumann series", answer, "power", state, server, products=1)

    def _add_power(self, cohort: Cohort, answers: Answers | None, state: State) -> Progress:
        assert answers is not None
        power = self.checked_vector(answers.vectors["power"], state["first_norm"])
        return Progress({"power": power, "vector": within(state["vector"] + power, self.clip)})

    # ------------------------------------------------------------------ series of the clients' own Hessians

    def _ask_own_series(self, state: State, server: ServerView) -> Inquiry:
        rate = self.rate_of(state)

        def answer(problem: LocalProblem, sent: Mapping[str, Tensor]) -> Answer:
            def multiply(vector: Tensor) -> Tensor:
                return multiplied(problem, vector, rate)

            return {"series": neumann_sum(multiply, sent["power"], self.terms)}

        return self._inquiry_of_series("Neumann series", answer, "series", state, server, products=self.terms)

    def _keep_series(self, cohort: Cohort, answers: Answers | None, state: State) -> Progress:
        assert answers is not None
        return Progress({"vector": self.checked_vector(answers.vectors["series"], state["first_norm"])})

    def _inquiry_of_series(
        self, name: str, answer: Any, vector: str, state: State, server: ServerView, *, products: int
    ) -> Inquiry:
        """Make an inquiry that multiplies the last power of the series."""
        return Inquiry(
            name,
            answer,
            {vector: server.layout},
            sent={"power": (state["power"], server.layout)},
            replaces_training=True,
            products=products,
        )

    # ------------------------------------------------------------------ the clients' own hypergradients

    def _ask_local(self, state: State, server: ServerView) -> Inquiry:
        factor_rate = self.rate_of(state)
        step_rate = self.upper_lr / self.upper_steps

        def answer(problem: LocalProblem, sent: Mapping[str, Tensor]) -> Answer:
            upper = problem.upper
            first_loss = None
            for _ in range(self.upper_steps):
                at_upper = problem.at(problem.lower, upper)
                estimate, loss = local_hypergradient(at_upper, factor_rate, self.terms)
                upper = upper - step_rate * estimate
                if first_loss is None:
                    first_loss = loss
            assert first_loss is not None
            # The direction of all steps together, which the server's optimizer takes.
            return self.direction_and_loss((problem.upper - upper) / self.upper_lr, first_loss)

        products = self.upper_steps * (self.terms + 1)
        layouts = self.layouts_of_direction()
        return Inquiry(
            "own hypergradient",
            answer,
            layouts["vectors"],
            placed=layouts["placed"],
            replaces_training=True,
            products=products,
        )

    def _finish_local(self, cohort: Cohort, answers: Answers | None, state: State) -> Progress:
        assert answers is not None
        return self.upper_step(state, self.direction_of(answers), answers.numbers["upper loss"], answers.rows)

"""The communication rounds of an outer step: what clients are asked for in each, and what becomes of the answers.

Shapes: P lower variables (the trainable parameters).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.inquiry import Answer, Answers, Inquiry, LocalProblem
from lightning_fedhaw.rule import ServerView, State


@dataclass(frozen=True)
class Progress:
    """The outcome of one communication round of an outer step.

    Attributes:
        state: The entries of the rule's state that the round changes.
        lower: ``[P]``, the new lower variables; ``None`` where they stay.
        metrics: Numbers for the log.
    """

    state: Mapping[str, Any] = field(default_factory=dict)
    lower: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OuterRound:
    """One communication round of an outer step.

    Attributes:
        ask: Returns what clients are asked for; ``None`` where they only train.
        finish: Takes what the server received; it is given the cohort, its answers and the state.
    """

    ask: Callable[[State, ServerView], Inquiry | None]
    finish: Callable[[Cohort, Answers | None, State], Progress]


def with_rider(outer_round: OuterRound, rider: OuterRound | None) -> OuterRound:
    """Return a round in which clients also send what a rider asks for."""
    if rider is None:
        return outer_round

    def ask(state: State, server: ServerView) -> Inquiry | None:
        inquiry = outer_round.ask(state, server)
        addition = rider.ask(state, server)
        if inquiry is None or addition is None:
            return inquiry or addition
        return _merged(inquiry, addition)

    def finish(cohort: Cohort, answers: Answers | None, state: State) -> Progress:
        progress = outer_round.finish(cohort, answers, state)
        addition = rider.finish(cohort, answers, state)
        return Progress({**progress.state, **addition.state}, progress.lower, {**progress.metrics, **addition.metrics})

    return OuterRound(ask, finish)


def _merged(first: Inquiry, second: Inquiry) -> Inquiry:
    """Return an inquiry for what two inquiries ask."""

    def answer(problem: LocalProblem, sent: Mapping[str, Tensor]) -> Answer:
        return {**first.answer(problem, sent), **second.answer(problem, sent)}

    return Inquiry(
        f"{first.name} and {second.name}",
        answer,
        {**first.vectors, **second.vectors},
        {**first.sent, **second.sent},
        {**first.placed, **second.placed},
        replaces_training=first.replaces_training or second.replaces_training,
        products=first.products + second.products,
    )

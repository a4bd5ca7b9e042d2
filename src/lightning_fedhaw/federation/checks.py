"""Checks of what a federation is given by rules and client objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.rule import LocalLRScale, Rule, RuleOutput
from lightning_fedhaw.vectors.layout import ParameterLayout


def check_objectives(objectives: Sequence[ClientObjective], host: Host) -> None:
    """Refuse client objectives where there is no loss to which they could be added."""
    if objectives and not host.module.automatic_optimization:
        names = ", ".join(type(objective).__name__ for objective in objectives)
        raise ValueError(
            f"Client objectives ({names}) are added to the loss that `training_step` returns, and with"
            " `automatic_optimization=False` it returns none. Add the term in `training_step`, or use automatic"
            " optimization."
        )


def check_step(step: Any, rule: str, clients: int) -> None:
    """Refuse an output of a rule that is of another type, or not for this cohort."""
    if not isinstance(step, RuleOutput):
        raise TypeError(
            f"`{rule}.step` must return a `RuleOutput(parameters, state, weights)`, got {type(step).__name__}."
        )
    if not isinstance(step.state, Mapping):
        raise TypeError(
            f"`{rule}.step` must return the rule's state as a dictionary, got {type(step.state).__name__}. A rule"
            " without state returns the one that it was given."
        )
    if step.weights.shape != (clients,):
        raise ValueError(
            f"`{rule}.step` must return one weight per client of the cohort, [{clients}], got"
            f" {list(step.weights.shape)}."
        )


def local_lr_scale(rule: Rule, layout: ParameterLayout, objectives: Sequence[ClientObjective]) -> LocalLRScale | None:
    """Return the rule's scale of the clients' learning rates in the next round; ``None`` without one.

    Raises:
        ValueError: If it changes them and a client objective divides by them.
    """
    lr_scale = rule.local_lr_scale(rule.state, layout)
    if lr_scale is not None and any(objective.needs_learning_rates for objective in objectives):
        raise ValueError(
            f"`{type(rule).__name__}` changes the clients' learning rates within a round, and a client objective"
            ' divides by them. Use a rule that leaves them alone, or for SCAFFOLD `option="I"`.'
        )
    return lr_scale

"""How far a client's local work carries its parameters, for those who divide by it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def normalizer(steps: int, momentum: float = 0.0, nesterov: bool = False, proximal: float = 0.0) -> float:
    """``A``: how far a local optimizer with a learning rate of 1 goes on gradients of -1.

    Args:
        steps: Its steps, from rest.
        momentum: Its momentum.
        nesterov: Whether it looks ahead.
        proximal: Learning rate times the factor of a proximal term, ``lr mu``.

    Example:
        >>> normalizer(5), round(normalizer(5, momentum=0.9), 4), round(normalizer(5, pull=0.1), 4)
        (5.0, 13.1441, 4.0951)
    """
    reached = velocity = 0.0
    for _ in range(steps):
        push = 1 - proximal * reached
        velocity = momentum * velocity + push
        reached += push + momentum * velocity if nesterov else velocity
    return reached


def sgd_groups(trainer: Any, who: str, remedy: str) -> list[dict[str, Any]]:
    """The parameter groups of the clients' optimizers, if it is known how far these go in a number of steps.

    Args:
        trainer: The trainer, when ``fit`` begins.
        who: Who wants to know, for the sentence.
        remedy: What else may be done.

    Raises:
        ValueError: If one is not ``torch.optim.SGD``, has dampening, or has momentum that outlives the round.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    what = [type(optimizer).__name__ for optimizer in trainer.optimizers if type(optimizer) is not torch.optim.SGD]
    if not what and any(group["maximize"] or (group["dampening"] and group["momentum"]) for group in groups):
        what = ["SGD with dampening, or one that maximizes"]
    if what:
        raise ValueError(
            f"{who} has to know how far a local optimizer goes in a number of steps, and knows it of `torch.optim.SGD`"
            f" without dampening; `configure_optimizers` gave {', '.join(what)}. Use such an SGD, or {remedy}."
        )
    if any(group["momentum"] for group in groups) and trainer.federation_options.optimizer_state == "kept":
        raise ValueError(
            f"{who} counts on momentum that starts at 0 every round, and"
            ' `optimizer_state="kept"` lets it go on. Use `optimizer_state="fresh"`.'
        )
    return groups

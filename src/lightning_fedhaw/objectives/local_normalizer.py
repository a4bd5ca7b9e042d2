"""Local normalizers: how far a client's local steps move its parameters, for methods that divide by it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from lightning_fedhaw.objectives.local_training import LocalTraining

ParameterGroup = dict[str, Any]
"""A parameter group of a ``torch.optim.Optimizer``."""


@cache
def normalizer(steps: int, momentum: float = 0.0, nesterov: bool = False, proximal: float = 0.0) -> float:
    """Return FedNova's ``a_k``: how far SGD with a learning rate of 1 moves on gradients of -1.

    Args:
        steps: The number of steps, with a momentum buffer that begins at 0.
        momentum: The momentum.
        nesterov: Whether it is Nesterov's momentum.
        proximal: Learning rate times the proximal coefficient, ``lr mu``.

    Example:
        >>> normalizer(5), round(normalizer(5, momentum=0.9), 4), round(normalizer(5, proximal=0.1), 4)
        (5.0, 13.1441, 4.0951)
    """
    distance = velocity = 0.0
    for _ in range(steps):
        # A proximal term pulls back in proportion to the distance.
        descent = 1 - proximal * distance
        velocity = momentum * velocity + descent
        distance += descent + momentum * velocity if nesterov else velocity
    return distance


def sgd_groups(local_training: LocalTraining, method: str, remedy: str) -> list[ParameterGroup]:
    """Return the parameter groups of the clients' optimizers, if these are SGD whose normalizer is known.

    Args:
        local_training: How clients train.
        method: The method that needs the normalizer, for the message.
        remedy: An alternative to such an SGD, for the message.

    Raises:
        ValueError: If an optimizer is not ``torch.optim.SGD``, has dampening, maximizes, or has momentum that is kept
            from round to round.
    """
    groups: list[ParameterGroup] = []
    unsupported: list[str] = []
    for optimizer in local_training.optimizers:
        groups.extend(optimizer.param_groups)
        if type(optimizer) is not torch.optim.SGD:
            unsupported.append(type(optimizer).__name__)
    if not unsupported and any(group["maximize"] or (group["dampening"] and group["momentum"]) for group in groups):
        unsupported.append("SGD with dampening, or one that maximizes")
    if unsupported:
        raise ValueError(
            f"{method} must know how far a local optimizer moves in a given number of steps, which is known only for"
            f" `torch.optim.SGD` without dampening; `configure_optimizers` gave {', '.join(unsupported)}. Use such an"
            f" SGD, or {remedy}."
        )
    has_momentum = any(group["momentum"] for group in groups)
    if has_momentum and local_training.optimizer_state == "kept":
        raise ValueError(
            f"{method} needs momentum that begins at 0 in every round, and"
            ' `optimizer_state="kept"` keeps it from round to round. Use `optimizer_state="fresh"`.'
        )
    return groups

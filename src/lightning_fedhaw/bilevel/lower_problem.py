"""What bilevel rules read of the clients' optimizers: the rate of a lower step, and the problem that steps solve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_fedhaw.federation.weight_decay import is_decoupled


def rate_of_lower_step(rule: str, optimizers: Sequence[Optimizer]) -> float:
    """Return the learning rate of the clients' plain SGD.

    Args:
        rule: The rule's name, for errors.
        optimizers: The clients' optimizers, with the rates of the coming round.

    Raises:
        ValueError: If a step of an optimizer is not proportional to the gradient, or rates differ.
    """
    rates: set[float] = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rates.add(float(group["lr"]))
            if type(optimizer) is not torch.optim.SGD:
                raise ValueError(_no_rate(rule, f"the clients' optimizer is {type(optimizer).__name__}"))
            if group["momentum"]:
                raise ValueError(_no_rate(rule, f"the clients' SGD has `momentum`={group['momentum']}"))
    if len(rates) != 1:
        raise ValueError(_no_rate(rule, f"the clients train with the rates {sorted(rates)}"))
    return rates.pop()


def _no_rate(rule: str, finding: str) -> str:
    return (
        f"`{rule}` multiplies second derivatives by the rate of a lower step, and takes that of plain SGD, but"
        f" {finding}. Give `lower_lr=`, a number below 2 divided by the largest eigenvalue of the lower loss's Hessian."
    )


def check_lower_problem(rule: str, optimizers: Sequence[Optimizer], has_warned: bool) -> bool:
    """Refuse optimizers that maximize the loss, and warn of a weight decay that derivatives leave out.

    Args:
        rule: The rule's name, for messages.
        optimizers: The clients' optimizers.
        has_warned: Whether the warning was given.

    Returns:
        Whether the warning was given by now.

    Raises:
        ValueError: If an optimizer maximizes.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            name = type(optimizer).__name__
            if group.get("maximize"):
                raise ValueError(
                    f"`{rule}` computes the derivatives of a lower loss that clients minimize, and their {name} has"
                    " `maximize=True`. Return the negative loss in `training_step` instead."
                )
            if group.get("weight_decay") and is_decoupled(optimizer, group) and not has_warned:
                has_warned = True
                rank_zero_warn(
                    f"{name} shrinks parameters by `weight_decay`={group['weight_decay']} apart from the loss, which"
                    f" the derivatives of `{rule}` leave out. Set `weight_decay=0`, and add the decay to the loss in"
                    " `training_step` or take an optimizer that does, such as `torch.optim.Adam(weight_decay=...)`."
                )
    return has_warned

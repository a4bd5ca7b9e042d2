"""Optimizers and schedules that users describe by a class or a function that makes them; no rule itself.

A rule needs a new optimizer in every round, so its argument is a factory, such as ``torch.optim.Adam`` or a
``functools.partial`` of it. It is tried once when the rule is made, so that a mistake does not surface hours later.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

OptimizerFactory = Callable[..., torch.optim.Optimizer]
"""Makes an optimizer from ``(parameters, lr=...)``."""

SchedulerFactory = Callable[[torch.optim.Optimizer], Any]
"""Makes a schedule from an optimizer: any object with a ``step`` that needs no argument."""


def check_optimizer(
    name: str, factory: OptimizerFactory, lr: float, *, takes_closure: bool = False
) -> torch.optim.Optimizer:
    """Make an optimizer of a single number, to try a factory.

    Args:
        name: The argument that is the factory, for the message.
        factory: Its value.
        lr: The learning rate.
        takes_closure: Whether the rule calls the optimizer's ``step`` with a closure.

    Raises:
        TypeError: If the factory makes no optimizer, or one whose ``step`` needs more arguments.
    """
    # Of two axes, because some optimizers, such as Muon, take matrices only.
    parameter = torch.zeros(1, 1, requires_grad=True)
    product = "an optimizer from parameters and `lr`"
    step_argument = "closure"
    if not takes_closure:
        product += ", one that steps on a given gradient"
        step_argument = ""
    optimizer: torch.optim.Optimizer = _try_factory(
        name,
        factory,
        lambda: factory([parameter], lr=lr),
        product=product,
        example="torch.optim.SGD, momentum=0.9",
        step_argument=step_argument,
    )
    return optimizer


def optimizer_step(
    factory: OptimizerFactory,
    lr: float,
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    memory: Mapping[Any, Any],
) -> tuple[list[Tensor], dict[Any, Any]]:
    """Take one step of an optimizer whose memory is a rule's state.

    Args:
        factory: Makes the optimizer from ``(parameters, lr=...)``.
        lr: The learning rate.
        values: The numbers to step. Not changed.
        gradients: Their gradients.
        memory: What the optimizer remembers of its last steps; empty before the first. Not changed.

    Returns:
        The new values, and the new memory.
    """
    variables = [value.detach().clone().requires_grad_() for value in values]
    optimizer = factory(variables, lr=lr)
    # The new optimizer's own settings, so that a resumed run may change them; a copy, because steps change memory.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(dict(memory))})
    for variable, gradient in zip(variables, gradients, strict=True):
        variable.grad = gradient
    optimizer.step()
    return [variable.detach() for variable in variables], dict(optimizer.state_dict()["state"])


def check_schedule(name: str, factory: SchedulerFactory | None, optimizer: torch.optim.Optimizer) -> None:
    """Try a factory of schedules on an optimizer.

    Args:
        name: The argument that is the factory, for the message.
        factory: Its value; ``None`` is allowed and stands for no schedule.
        optimizer: The optimizer to make a schedule of.

    Raises:
        TypeError: If the factory makes no schedule, or one whose ``step`` needs arguments.
    """
    if factory is not None:
        _try_factory(
            name,
            factory,
            lambda: factory(optimizer),
            product="a schedule from the optimizer",
            example="StepLR, step_size=20",
        )


def _try_factory(
    name: str, factory: object, make: Callable[[], Any], *, product: str, example: str, step_argument: str = ""
) -> Any:
    """Return the result of ``make``, and refuse one whose ``step`` needs another argument than ``step_argument``."""
    try:
        result = make()
        for argument in _required_arguments(result.step):
            if argument != step_argument:
                raise TypeError(f"{type(result).__name__}.step needs `{argument}`, which it is not given")
    except Exception as error:
        # A factory is the user's code and may raise anything.
        factory_name = getattr(factory, "__name__", repr(factory))
        if hasattr(factory, "state_dict") and not isinstance(factory, type):
            factory_name = f"a ready-made {type(factory).__name__}"
        raise TypeError(
            f"`{name}` must make {product}: give a class or a `functools.partial` of one, such as `partial({example})`,"
            f" got {factory_name} ({error})."
        ) from error
    return result


def _required_arguments(function: Callable[..., object]) -> list[str]:
    """List the arguments without which a function cannot be called."""
    names: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not is_variadic:
            names.append(parameter.name)
    return names

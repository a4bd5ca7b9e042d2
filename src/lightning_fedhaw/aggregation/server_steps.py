"""The derivative of a server optimizer's step in its hyper-parameters; no rule itself.

A number that requires gradients in an optimizer's group gives wrong derivatives or none (that of ``Adam``'s rate is
zero), so the steps of SGD and of the Adam family are written here as pure functions, through which dual numbers are
exact. Hyper-parameters of any other optimizer are differentiated by a central difference of its own step in float64,
which costs two steps of the optimizer and asks no client.

An optimizer may bring its own pure function, as a static method ``pure_step`` of the form of :data:`PureStep`.

Shapes: P trainable parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim import Optimizer

from lightning_fedhaw import arguments
from lightning_fedhaw.aggregation.factories import OptimizerFactory
from lightning_fedhaw.autodiff.duals import dual_of, load_rules, parts_of

Settings = Mapping[str, Any]

PureStep = Callable[[Tensor, Tensor, Settings, Settings], Tensor]
"""``step(parameter, gradient, memory, settings)`` returns the parameter after a step of the optimizer with this memory
for the parameter and these settings of its group; nothing is changed, and it is differentiable in the settings."""

WIDTH = 1e-4
"""Half the width of a central difference, relative to the hyper-parameter, or to its distance from 1."""

TOLERANCE = 1e-5
"""How far a derivative may be from a central difference, relative to its length."""


def sgd_step(parameter: Tensor, gradient: Tensor, memory: Settings, settings: Settings) -> Tensor:
    """Take a step of ``torch.optim.SGD``; see :data:`PureStep`."""
    direction = gradient + settings["weight_decay"] * parameter
    velocity = memory.get("momentum_buffer")
    new_velocity = direction
    if velocity is not None:
        new_velocity = settings["momentum"] * velocity + (1 - settings["dampening"]) * direction
    if settings["nesterov"]:
        new_velocity = direction + settings["momentum"] * new_velocity
    new_parameter: Tensor = parameter - settings["lr"] * new_velocity
    return new_parameter


def adam_step(parameter: Tensor, gradient: Tensor, memory: Settings, settings: Settings) -> Tensor:
    """Take a step of ``torch.optim.Adam`` or ``AdamW``; see :data:`PureStep`."""
    beta1, beta2 = settings["betas"]
    if settings["decoupled_weight_decay"]:
        parameter = parameter - settings["lr"] * settings["weight_decay"] * parameter
    else:
        gradient = gradient + settings["weight_decay"] * parameter
    zeros = torch.zeros_like(parameter)
    count = float(memory.get("step", 0)) + 1
    mean = beta1 * memory.get("exp_avg", zeros) + (1 - beta1) * gradient
    square = beta2 * memory.get("exp_avg_sq", zeros) + (1 - beta2) * gradient.square()
    correction = 1 - beta1**count
    root_correction = (1 - beta2**count) ** 0.5
    direction = mean / correction / (root(square) / root_correction + settings["eps"])
    new_parameter: Tensor = parameter - settings["lr"] * direction
    return new_parameter


def root(square: Tensor) -> Tensor:
    """Return the square root, whose derivative at 0 is 0: there the derivative of the second moment is 0, too."""
    is_positive = square > 0
    return torch.where(is_positive, torch.where(is_positive, square, 1.0).sqrt(), 0.0)


def pure_step_of(optimizer: Optimizer) -> PureStep | None:
    """Return the pure function of an optimizer's step; ``None`` if there is none for it, or for its settings."""
    own: PureStep | None = getattr(optimizer, "pure_step", None)
    if own is not None:
        return own
    settings = optimizer.param_groups[0]
    if settings.get("maximize") or settings.get("amsgrad"):
        return None
    if type(optimizer) is torch.optim.SGD:
        return sgd_step
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        return adam_step
    return None


# ---------------------------------------------------------------------- hyper-parameters by name


def hyper_parameters(optimizer: Optimizer) -> dict[str, object]:
    """Return an optimizer's settings by name; those of a tuple are numbered (``betas`` holds ``beta1``, ``beta2``)."""
    named: dict[str, object] = {}
    for key, value in optimizer.param_groups[0].items():
        if key == "params":
            continue
        if isinstance(value, (tuple, list)):
            for position, number in enumerate(value):
                named[f"{key.removesuffix('s')}{position + 1}"] = number
        else:
            named[key] = value
    return named


def replaced(settings: Settings, values: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings of a group with other values, named as in :func:`hyper_parameters`."""
    new = dict(settings)
    for name, value in values.items():
        if name in new:
            new[name] = value
            continue
        key = f"{name[:-1]}s"
        numbers = list(new[key])
        numbers[int(name[-1]) - 1] = value
        new[key] = tuple(numbers)
    return new


def set_hyper_parameters(optimizer: Optimizer, values: Mapping[str, float]) -> None:
    """Give an optimizer other hyper-parameters."""
    group = optimizer.param_groups[0]
    group.update(replaced(group, values))


# ---------------------------------------------------------------------- derivatives


def tangent(optimizer: Optimizer, name: str, make: OptimizerFactory) -> Tensor:
    """Compute the derivative ``[P]`` of the step that an optimizer is about to take, in one hyper-parameter.

    Args:
        optimizer: The optimizer, with its memory and the gradients. Not changed.
        name: The hyper-parameter.
        make: Makes such an optimizer from ``(parameters, lr=...)``.
    """
    step = pure_step_of(optimizer)
    if step is None:
        return difference(optimizer, name, make)
    group = optimizer.param_groups[0]
    value = torch.tensor(float(hyper_parameters(optimizer)[name]), dtype=torch.float64)  # type: ignore[arg-type]
    parts = []
    for parameter in group["params"]:
        memory = optimizer.state.get(parameter, {})
        parts.append(_derivative(step, parameter.detach(), parameter.grad, memory, group, name, value))
    return torch.cat(parts)


def _derivative(
    step: PureStep, parameter: Tensor, gradient: Tensor, memory: Settings, group: Settings, name: str, value: Tensor
) -> Tensor:
    """Compute the derivative of one parameter's step in the hyper-parameter ``value`` [], flat."""
    load_rules()
    with forward_ad.dual_level():
        number = dual_of(value, torch.ones_like(value))
        _, derivative = parts_of(step(parameter, gradient, memory, replaced(group, {name: number})))
    if derivative is None:
        # The first step of a decay, for example, does not depend on it.
        derivative = torch.zeros_like(parameter)
    return derivative.reshape(-1).to(parameter)


@torch.no_grad()
def difference(optimizer: Optimizer, name: str, make: OptimizerFactory, width: float = WIDTH) -> Tensor:
    """Compute the same derivative as :func:`tangent` by a central difference of the optimizer's own step in float64.

    Args:
        optimizer: As in :func:`tangent`.
        name: As in :func:`tangent`.
        make: As in :func:`tangent`.
        width: As :data:`WIDTH`.
    """
    value = float(hyper_parameters(optimizer)[name])  # type: ignore[arg-type]
    # A decay close to 1 acts by its distance from 1.
    scale = min(value, 1 - value) if 0 < value < 1 else abs(value)
    half = width * max(scale, 1e-4)
    above = _stepped(optimizer, {name: value + half}, make)
    below = _stepped(optimizer, {name: value - half}, make)
    return ((above - below) / (2 * half)).to(optimizer.param_groups[0]["params"][0])


def _stepped(optimizer: Optimizer, values: Mapping[str, float], make: OptimizerFactory) -> Tensor:
    """Return the parameters ``[P]`` in float64 after the step of a copy of an optimizer with other hyper-parameters."""
    parameters = []
    for parameter in optimizer.param_groups[0]["params"]:
        # Copies in any case: the optimizer changes them, and some change the gradient.
        twin = parameter.detach().to(torch.float64, copy=True).requires_grad_()
        twin.grad = parameter.grad.to(torch.float64, copy=True)
        parameters.append(twin)
    other = make(parameters, lr=float(optimizer.param_groups[0]["lr"]))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_hyper_parameters(other, values)
    other.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


# ---------------------------------------------------------------------- checks before the first round


def check_names(learn: object, optimizer: Optimizer) -> dict[str, float]:
    """Return the hyper-parameters with these names, and refuse those that cannot be learned.

    Raises:
        ValueError: If a name occurs twice, the optimizer has none of that name, or it is no real number.
    """
    kind = type(optimizer).__name__
    known = hyper_parameters(optimizer)
    starts: dict[str, float] = {}
    if isinstance(learn, str) or not isinstance(learn, Iterable):
        raise arguments.invalid("learn", 'names of hyper-parameters, such as ("lr", "momentum")', learn)
    for given in learn:
        name = arguments.text("learn", given)
        if name in starts:
            raise ValueError(f"`learn` names {name!r} twice. Name each quantity once.")
        value = known.get(name)
        if not isinstance(value, float):
            real = []
            for other, number in known.items():
                if isinstance(number, float):
                    real.append(other)
            problem = f"is {value!r}, which is no real number"
            if name not in known:
                problem = "does not exist"
            raise ValueError(
                f"`learn` names {name!r}, and that hyper-parameter of {kind} {problem}. It can be {', '.join(real)}; a"
                " number that was given as a whole number is one, such as `momentum=0`."
            )
        starts[name] = value
    return starts


def check_derivatives(names: Sequence[str], make: OptimizerFactory, lr: float) -> None:
    """Hold the derivative in each hyper-parameter against a central difference, on a few numbers.

    Args:
        names: The hyper-parameters.
        make: Makes the optimizer from ``(parameters, lr=...)``.
        lr: The server's learning rate.

    Raises:
        ValueError: If a derivative is wrong, or the step does not depend on the hyper-parameter.
    """
    # Of two axes, because some optimizers take matrices only.
    parameter = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    optimizer = make([parameter], lr=lr)
    for gradient in ([1.0, -0.5, 0.25], [0.5, 0.25, -1.0], [-0.75, 0.5, 0.5]):
        if parameter.grad is not None:
            # The first two steps only fill the optimizer's memory.
            optimizer.step()
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
    kind = type(optimizer).__name__
    for name in names:
        derivative = tangent(optimizer, name, make)
        reference = difference(optimizer, name, make, 8 * WIDTH)
        if not reference.abs().max() > 0 or not torch.isfinite(reference).all():
            raise ValueError(
                f"`learn` names {name!r}, and the step of {kind} does not depend on it as it is set here: there is"
                " nothing to learn. Leave it out, or start it at another value."
            )
        error = float((derivative - reference).norm() / reference.norm())
        if not error <= TOLERANCE:
            raise ValueError(
                f"`learn` names {name!r}, and the derivative of {kind}'s step in it differs from a central difference"
                f" by {error:.1g} of its length, so it would be learned wrongly. Leave it out, or use SGD, Adam, AdamW"
                " or one of the adaptive rules."
            )

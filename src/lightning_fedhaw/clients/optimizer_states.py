"""The states and settings of the user's optimizers, taken from one client and given to the next."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fedhaw.clients.steps import parameters_of

ParameterState = dict[str, Any]
"""The state that an optimizer keeps for one parameter, by name; values of any type, as in ``torch.optim``."""

OptimizerStates = dict[int, ParameterState]
"""The states of one optimizer, by position of the parameter in the optimizer's groups."""

Settings = list[list[dict[str, Any]]]
"""For each optimizer, and each of its parameter groups, the options by name."""


def states_of(optimizer: Optimizer) -> OptimizerStates:
    """Return an optimizer's states in host memory.

    States that are there already are not copied. That is safe because :func:`restore_states` replaces them before the
    next client trains.
    """
    states: OptimizerStates = {}
    for index, parameter in enumerate(parameters_of(optimizer)):
        if parameter not in optimizer.state:
            continue
        state = {}
        for name, value in optimizer.state[parameter].items():
            state[name] = value.cpu() if isinstance(value, Tensor) else value
        states[index] = state
    return states


def device_of_state(name: str, device: torch.device, group: Mapping[str, Any]) -> torch.device:
    """Return the device where an optimizer reads a state, as ``torch.optim.Optimizer.load_state_dict`` places it.

    Args:
        name: The state's name.
        device: The device of its parameter.
        group: The options of the parameter's group.
    """
    # Plain optimizers read `step` on the host in every step; fused and capturable kernels read it where they run.
    if name == "step" and not (group.get("fused") or group.get("capturable")):
        return torch.device("cpu")
    return device


def restore_states(optimizer: Optimizer, states: Mapping[int, Mapping[str, Any]]) -> None:
    """Replace an optimizer's states by copies of those that :func:`states_of` returned."""
    optimizer.state = defaultdict(dict)
    if not states:
        return
    index = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if index in states:
                optimizer.state[parameter] = _placed_copy(states[index], parameter.device, group)
            index += 1


def _placed_copy(state: Mapping[str, Any], device: torch.device, group: Mapping[str, Any]) -> ParameterState:
    """Copy a parameter's state to the devices where the optimizer reads it."""
    copied = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            copied[name] = value.to(device_of_state(name, device, group), copy=True)
        else:
            copied[name] = copy.deepcopy(value)
    return copied


def settings_of(optimizers: Sequence[Optimizer]) -> Settings:
    """Copy the options of every parameter group, which a module may change while a client trains."""
    settings = []
    for optimizer in optimizers:
        settings.append([_options_of(group) for group in optimizer.param_groups])
    return settings


def _options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    options = {}
    for name, value in group.items():
        if name != "params":
            # A rate that is a tensor is changed in place by schedules.
            options[name] = value.clone() if isinstance(value, Tensor) else value
    return options


def restore_settings(optimizers: Sequence[Optimizer], settings: Settings) -> None:
    """Restore the options that :func:`settings_of` returned."""
    for optimizer, groups in zip(optimizers, settings, strict=True):
        for group, options in zip(optimizer.param_groups, groups, strict=True):
            for name, value in options.items():
                if not isinstance(value, Tensor):
                    group[name] = value
                    continue
                # A copy, so that a rate changed in place does not change what it is restored to; and on the device of
                # the present rate, because what another process sent is in host memory.
                present = group.get(name)
                device = present.device if isinstance(present, Tensor) else value.device
                group[name] = value.to(device, copy=True)

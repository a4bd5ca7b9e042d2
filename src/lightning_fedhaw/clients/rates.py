"""A client's own factor on the learning rates, while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_fedhaw.clients.engine import EndState
from lightning_fedhaw.clients.optimizer_states import restore_settings, settings_of
from lightning_fedhaw.clients.steps import Host

RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""The options of a parameter group that are learning rates: the present one, and those that schedules start from."""

PROPORTIONAL = (
    torch.optim.SGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
)
"""Optimizers whose step is proportional to the learning rate, so that a factor on the step is a factor on the rate."""


def scale_rates(host: Host, scale: float) -> None:
    """Multiply all learning rates, and those that the module's own schedules compute with, by a factor."""
    for optimizer in host.optimizers:
        for group in optimizer.param_groups:
            for name in RATES:
                if name in group:
                    # Not in place, because a rate that is a tensor may be in a saved state.
                    group[name] = group[name] * scale
    schedules = host.schedules()
    for state in schedules:
        if "base_lrs" in state:
            state["base_lrs"] = [rate * scale for rate in state["base_lrs"]]
    host.load_schedules(schedules)


@contextmanager
def scaled_rates(host: Host, scale: float) -> Iterator[None]:
    """Multiply all learning rates by a factor inside the context."""
    if scale == 1.0:
        yield
        return
    settings = settings_of(host.optimizers)
    schedules = host.schedules()
    scale_rates(host, scale)
    try:
        yield
    finally:
        restore_settings(host.optimizers, settings)
        host.load_schedules(schedules)


def unscaled(end: EndState, begin: EndState, scale: float) -> EndState:
    """Return the state of settings and schedules after a client trained, without the client's own factor.

    Args:
        end: The state after it trained.
        begin: The state before :func:`scale_rates`.
        scale: Its factor.
    """
    settings = []
    for groups, groups_before in zip(end.settings, begin.settings, strict=True):
        of_optimizer = []
        for options, options_before in zip(groups, groups_before, strict=True):
            rates = {}
            for name in RATES:
                if name in options_before:
                    rates[name] = options_before[name]
            # A schedule changes the present rate only.
            rates["lr"] = options["lr"] / scale
            of_optimizer.append({**options, **rates})
        settings.append(of_optimizer)
    schedules = []
    for state, state_before in zip(end.schedules, begin.schedules, strict=True):
        if "base_lrs" in state:
            state = {**state, "base_lrs": state_before["base_lrs"]}
        schedules.append(state)
    return end._replace(settings=settings, schedules=schedules)

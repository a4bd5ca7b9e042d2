"""What of the state of training is sent: settings, schedules and loss scale, and the rule's scale of the rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from lightning_fedhaw.clients.engine import EndState
from lightning_fedhaw.rule import LocalLRScale


def sent_state(state: EndState) -> list[Any]:
    """Return the state of settings, schedules and loss scale as plain values and tensors."""
    return [state.settings, state.schedules, state.scales]


def state_from(content: Any) -> EndState:
    """Make the state that :func:`sent_state` was given.

    Raises:
        ValueError: If it is none.
    """
    settings, schedules, scales = content
    return EndState(settings, schedules, scales, {})


def sent_scale(lr_scale: LocalLRScale | None) -> dict[str, Any] | None:
    """Return a scale as the attributes that it is made of, with the name of its class."""
    if lr_scale is None:
        return None
    return {"class": _name(type(lr_scale)), "attributes": dict(vars(lr_scale))}


def scale_from(content: Mapping[str, Any] | None, device: torch.device) -> LocalLRScale | None:
    """Make the scale that :func:`sent_scale` was given.

    Args:
        content: What it returned.
        device: The device of its tensors.

    Raises:
        ValueError: If the site does not know the class, which comes with the rule.
    """
    if content is None:
        return None
    for kind in _classes(LocalLRScale):
        if _name(kind) == content["class"]:
            lr_scale: LocalLRScale = object.__new__(kind)
            vars(lr_scale).update(move_data_to_device(dict(content["attributes"]), device))
            return lr_scale
    raise ValueError(f"the site does not know the class `{content['class']}` of the server's rule: import it there")


def _classes(kind: type) -> Iterator[type]:
    """Yield all classes derived from one."""
    subclasses: list[type] = kind.__subclasses__()
    for derived in subclasses:
        yield derived
        yield from _classes(derived)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

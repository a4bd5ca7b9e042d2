"""Fingerprints of the values that a module's attributes hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric

Undo = Callable[[], None]
"""Puts a value back that was changed in place."""

MAX_DEPTH = 4
"""Containers and objects in each other that are looked into."""


def fingerprint(value: Any, undo: list[Undo] | None = None, depth: int = MAX_DEPTH) -> Any:
    """Return something that differs when a value was changed in place.

    Args:
        value: Any value.
        undo: Receives what puts the value's present content back, if given.
        depth: How many containers and objects in each other are looked into.
    """
    if isinstance(value, nn.Parameter):
        # Its values are looked at where the module holds it.
        return id(value)
    if isinstance(value, torch.Generator):
        if undo is not None:
            undo.append(cast(Undo, partial(value.set_state, value.get_state())))
        return id(value), value.get_state().numpy().tobytes()
    if isinstance(value, Tensor):
        if undo is not None:
            undo.append(partial(_copy_back, value, value.detach().clone()))
        return id(value), value._version
    if isinstance(value, (int, float, complex, str, bytes, type(None))):
        return repr(value)
    if depth and isinstance(value, (list, deque)):
        if undo is not None:
            undo.append(partial(_refill_list, value, list(value)))
        return id(value), tuple(fingerprint(item, undo, depth - 1) for item in value)
    if depth and isinstance(value, tuple):
        return id(value), tuple(fingerprint(item, undo, depth - 1) for item in value)
    if depth and isinstance(value, dict):
        if undo is not None:
            undo.append(partial(_refill, value, dict(value)))
        return id(value), tuple((repr(key), fingerprint(item, undo, depth - 1)) for key, item in value.items())
    if isinstance(value, set):
        if undo is not None:
            undo.append(partial(_refill, value, set(value)))
        return id(value), len(value)
    if depth and (isinstance(value, Metric) or _is_plain_object(value)):
        return id(value), fingerprint(vars(value), undo, depth - 1)
    return id(value)


def _is_plain_object(value: Any) -> bool:
    """Whether something of the user's keeps its state in attributes."""
    return hasattr(value, "__dict__") and not isinstance(
        value, (type, nn.Module, FunctionType, MethodType, ModuleType, Dataset, pl.Trainer, pl.LightningDataModule)
    )


def _copy_back(tensor: Tensor, content: Tensor) -> None:
    tensor.detach().copy_(content)


def _refill_list(container: list[Any] | deque[Any], content: list[Any]) -> None:
    container.clear()
    container.extend(content)


def _refill(container: dict[Any, Any] | set[Any], content: Any) -> None:
    container.clear()
    container.update(content)

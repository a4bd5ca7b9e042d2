"""Fingerprints of the values that a step may change: attributes of modules, classes and objects, globals."""

from __future__ import annotations

import copy
import itertools
import random
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import is_
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric

from lightning_fedhaw.clients.vectorized.tracing import is_users_class

Undo = Callable[[], None]
"""A function that restores a value which was changed in place."""

Fingerprint = object
"""A value that differs from an earlier one if the fingerprinted value was changed; only ever compared."""

Container = list[Any] | deque[Any] | dict[Any, Any] | set[Any]
"""A container that may be changed in place."""

MAX_DEPTH = 4
"""The depth to which nested containers and objects are looked into."""

MAX_ITEMS = 1000
"""The number of items up to which a container's items are looked into; of a larger one, only their identity counts."""

MAX_BYTES = 1 << 26
"""The size up to which the content of a NumPy array is looked at."""


class Fingerprints:
    """Fingerprints of values, which show whether a value was changed in place, and functions that restore it.

    Args:
        module_tensors: Tensors that are compared elsewhere: the module's parameters and buffers.
        undo: Receives a function for each value that restores its present content; none are made without it.
        copies_tensors: Whether that includes tensors and arrays, of which copies are kept.
        looks_into: Whether the attributes of an object are looked at. Default: those of any but a few large kinds.
    """

    def __init__(
        self,
        module_tensors: Iterable[Tensor],
        undo: list[Undo] | None = None,
        copies_tensors: bool = True,
        looks_into: Callable[[object], bool] | None = None,
    ) -> None:
        self.module_tensors = {id(tensor) for tensor in module_tensors}
        self.undo = undo
        self.copies_tensors = copies_tensors
        self.looks_into = looks_into or is_plain_object

    def of(self, value: object, depth: int = MAX_DEPTH) -> Fingerprint:
        """Return the fingerprint of a value.

        Args:
            value: Any value.
            depth: The depth to which nested containers and objects are looked into.
        """
        if isinstance(value, (int, float, complex, str, bytes, type(None))):
            return repr(value)
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if isinstance(value, np.ndarray):
            return self._of_array(value)
        if isinstance(value, itertools.count):
            return id(value), repr(value)
        state = self._of_generator(value)
        if state is not None:
            return id(value), state
        if depth and isinstance(value, (list, tuple, deque, dict, set)):
            return self._of_container(value, depth)
        if isinstance(value, nn.Module) and not isinstance(value, Metric):
            # One that a list hides from the module, such as a teacher; else its tensors are the module's own.
            return id(value), tuple(self.of(tensor) for tensor in (*value.parameters(), *value.buffers()))
        if depth and (isinstance(value, Metric) or self.looks_into(value)):
            return self._of_object(value, depth)
        return id(value)

    def _of_object(self, value: object, depth: int) -> Fingerprint:
        attributes = dict(_attributes_of(value))
        in_dict = getattr(value, "__dict__", {})
        self._add_undo(partial(_refill, in_dict, dict(in_dict)))
        in_slots = attributes.keys() - in_dict.keys()
        for name in in_slots:
            self._add_undo(partial(_set_back, value, name, attributes[name]))
        return id(value), tuple((name, self.of(item, depth - 1)) for name, item in attributes.items())

    def _of_tensor(self, value: Tensor) -> Fingerprint:
        # An inference tensor has no version, and cannot be changed where a step runs.
        if id(value) in self.module_tensors or value.is_inference():
            return id(value)
        if self.undo is not None and self.copies_tensors:
            self.undo.append(partial(_copy_back, value, value.detach().clone(), value._version))
        return id(value), value._version

    def _of_array(self, value: np.ndarray[Any, Any]) -> Fingerprint:
        if not value.flags.writeable or value.nbytes > MAX_BYTES or value.dtype.hasobject:
            return id(value)
        # Arrays count no versions, so their content is read.
        checksum = zlib.crc32(np.ascontiguousarray(value).tobytes())
        if self.undo is not None and self.copies_tensors:
            self.undo.append(partial(_copy_array_back, value, value.copy()))
        return id(value), checksum

    def _of_generator(self, value: object) -> Fingerprint | None:
        """Return the state of a random number generator; ``None`` for anything else."""
        if isinstance(value, torch.Generator):
            self._add_undo(partial(value.set_state, value.get_state()))
            return value.get_state().numpy().tobytes()
        if isinstance(value, np.random.Generator):
            state = copy.deepcopy(value.bit_generator.state)
            self._add_undo(partial(setattr, value.bit_generator, "state", state))
            return repr(state)
        if isinstance(value, np.random.RandomState):
            self._add_undo(partial(value.set_state, value.get_state(legacy=False)))
            return repr(value.get_state(legacy=False))
        if isinstance(value, random.Random):
            self._add_undo(partial(value.setstate, value.getstate()))
            return value.getstate()
        return None

    def _of_container(self, value: Container | tuple[Any, ...], depth: int) -> Fingerprint:
        if isinstance(value, tuple):
            return id(value), tuple(self.of(item, depth - 1) for item in value[:MAX_ITEMS])
        self._add_undo(partial(_refill, value, _items_of(value)))
        if isinstance(value, set):
            return id(value), frozenset(map(id, value))
        if isinstance(value, dict):
            if len(value) > MAX_ITEMS:
                return id(value), tuple(map(id, value)), tuple(map(id, value.values()))
            return id(value), tuple((repr(key), self.of(item, depth - 1)) for key, item in value.items())
        if len(value) > MAX_ITEMS:
            return id(value), tuple(map(id, value))
        return id(value), tuple(self.of(item, depth - 1) for item in value)

    def _add_undo(self, undo: Callable[..., object]) -> None:
        if self.undo is not None:
            self.undo.append(cast(Undo, undo))


def _items_of(container: Container) -> Container:
    """Copy a container's items."""
    if isinstance(container, dict):
        return dict(container)
    if isinstance(container, set):
        return set(container)
    return list(container)


def is_plain_object(value: object) -> bool:
    """Return whether an object keeps its state in attributes that a step of the user's may change."""
    if isinstance(value, (type, nn.Module, FunctionType, MethodType, ModuleType)):
        return False
    if isinstance(value, (Dataset, pl.Trainer, pl.LightningDataModule)):
        return False
    # Objects of libraries with slots, such as paths, keep computed values there, which is no side effect.
    return hasattr(value, "__dict__") or (hasattr(type(value), "__slots__") and is_users_class(type(value)))


def _attributes_of(value: object) -> Iterator[tuple[str, object]]:
    """Yield an object's attributes, in its dict and in slots."""
    yield from getattr(value, "__dict__", {}).items()
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        if isinstance(slots, str):
            slots = (slots,)
        for name in slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _set_back(value: object, name: str, item: object) -> None:
    """Restore an attribute, unless it is unchanged."""
    if getattr(value, name, None) is not item:
        # Also where the class is frozen, or watches its attributes.
        object.__setattr__(value, name, item)


def _copy_back(tensor: Tensor, content: Tensor, version: int) -> None:
    """Restore a tensor's content, unless it is unchanged."""
    # An unchanged tensor must not be written to: it may be expanded, or memory-mapped read-only.
    if tensor._version != version:
        tensor.detach().copy_(content)


def _copy_array_back(array: np.ndarray[Any, Any], content: np.ndarray[Any, Any]) -> None:
    """Restore an array's content, unless it is unchanged."""
    if array.tobytes() != content.tobytes():
        array[...] = content


def _refill(container: Container, content: Container) -> None:
    """Restore a container's items, unless they are unchanged."""
    if holds(container, content):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(cast(Any, content))
    else:
        container.extend(content)


def holds(container: Container, content: Container) -> bool:
    """Return whether a container holds these very objects, in this order."""
    if len(container) != len(content):
        return False
    if not content:
        # As most are: every layer has a dozen empty dictionaries of hooks.
        return True
    if isinstance(container, set):
        return set(map(id, container)) == set(map(id, content))
    if isinstance(container, dict) and isinstance(content, dict):
        has_values = all(map(is_, container.values(), content.values()))
        return has_values and all(map(is_, container, content))
    return all(map(is_, container, content))

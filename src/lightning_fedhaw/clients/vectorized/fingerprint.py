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
"""Puts a value back that was changed in place."""

MAX_DEPTH = 4
"""Containers and objects in each other that are looked into."""

MAX_ITEMS = 1000
"""Items up to which a container's items are looked into; of a larger one only which items it holds."""

MAX_BYTES = 1 << 26
"""Size up to which the content of a NumPy array is looked at."""


class Fingerprints:
    """Tell whether a value was changed in place since its last fingerprint, and put it back.

    Args:
        own: Tensors whose values are looked at elsewhere: the module's parameters and buffers.
        undo: Receives what puts contents back as they are now, if given.
        copies_tensors: Whether that holds for tensors and arrays, too, of which copies are kept.
    """

    def __init__(self, own: Iterable[Tensor], undo: list[Undo] | None = None, copies_tensors: bool = True) -> None:
        self.own = {id(tensor) for tensor in own}
        self.undo = undo
        self.copies_tensors = copies_tensors

    def of(self, value: Any, depth: int = MAX_DEPTH) -> Any:
        """Return something that differs when a value was changed in place.

        Args:
            value: Any value.
            depth: How many containers and objects in each other are looked into.
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
        if depth and (isinstance(value, Metric) or _is_plain_object(value)):
            attributes = dict(_state_of(value))
            own = getattr(value, "__dict__", {})
            self._remember(partial(_refill, own, dict(own)))
            for name in attributes.keys() - own.keys():
                self._remember(partial(_set_back, value, name, attributes[name]))
            return id(value), tuple((name, self.of(item, depth - 1)) for name, item in attributes.items())
        return id(value)

    def _of_tensor(self, value: Tensor) -> Any:
        # An inference tensor has no version, and cannot be changed where a step runs.
        if id(value) in self.own or value.is_inference():
            return id(value)
        if self.undo is not None and self.copies_tensors:
            self.undo.append(partial(_copy_back, value, value.detach().clone(), value._version))
        return id(value), value._version

    def _of_array(self, value: np.ndarray[Any, Any]) -> Any:
        if not value.flags.writeable or value.nbytes > MAX_BYTES or value.dtype.hasobject:
            return id(value)
        print_ = zlib.crc32(np.ascontiguousarray(value).tobytes())
        if self.undo is not None and self.copies_tensors:
            self.undo.append(partial(_copy_array_back, value, value.copy()))
        return id(value), print_

    def _of_generator(self, value: Any) -> Any:
        """Return the state of random numbers; ``None`` for anything else."""
        if isinstance(value, torch.Generator):
            self._remember(partial(value.set_state, value.get_state()))
            return value.get_state().numpy().tobytes()
        if isinstance(value, np.random.Generator):
            state = copy.deepcopy(value.bit_generator.state)
            self._remember(partial(setattr, value.bit_generator, "state", state))
            return repr(state)
        if isinstance(value, np.random.RandomState):
            self._remember(partial(value.set_state, value.get_state(legacy=False)))
            return repr(value.get_state(legacy=False))
        if isinstance(value, random.Random):
            self._remember(partial(value.setstate, value.getstate()))
            return value.getstate()
        return None

    def _of_container(
        self, value: list[Any] | tuple[Any, ...] | deque[Any] | dict[Any, Any] | set[Any], depth: int
    ) -> Any:
        if isinstance(value, tuple):
            return id(value), tuple(self.of(item, depth - 1) for item in value[:MAX_ITEMS])
        self._remember(partial(_refill, value, _items_of(value)))
        if isinstance(value, set):
            return id(value), frozenset(map(id, value))
        if isinstance(value, dict):
            if len(value) > MAX_ITEMS:
                return id(value), tuple(map(id, value)), tuple(map(id, value.values()))
            return id(value), tuple((repr(key), self.of(item, depth - 1)) for key, item in value.items())
        if len(value) > MAX_ITEMS:
            return id(value), tuple(map(id, value))
        return id(value), tuple(self.of(item, depth - 1) for item in value)

    def _remember(self, undo: Callable[..., Any]) -> None:
        if self.undo is not None:
            self.undo.append(cast(Undo, undo))


def _items_of(container: Any) -> Any:
    """Copy a container's items."""
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _is_plain_object(value: Any) -> bool:
    """Whether something of the user's keeps its state in attributes."""
    if isinstance(value, (type, nn.Module, FunctionType, MethodType, ModuleType)):
        return False
    if isinstance(value, (Dataset, pl.Trainer, pl.LightningDataModule)):
        return False
    # Libraries' objects with slots, such as paths, put away there what they have computed.
    return hasattr(value, "__dict__") or (hasattr(type(value), "__slots__") and is_users_class(type(value)))


def _state_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield an object's attributes, in its dict and in slots."""
    yield from getattr(value, "__dict__", {}).items()
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _set_back(value: Any, name: str, item: Any) -> None:
    if getattr(value, name, None) is not item:
        object.__setattr__(value, name, item)


def _copy_back(tensor: Tensor, content: Tensor, version: int) -> None:
    # What no step touched is not written: it may be expanded, or lie in a file that is only read.
    if tensor._version != version:
        tensor.detach().copy_(content)


def _copy_array_back(array: np.ndarray[Any, Any], content: np.ndarray[Any, Any]) -> None:
    if array.tobytes() != content.tobytes():
        array[...] = content


def _refill(container: Any, content: Any) -> None:
    """Put a container's items back, unless they are still there."""
    if _holds(container, content):
        return
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)


def _holds(container: Any, content: Any) -> bool:
    """Whether a container holds these very items."""
    if len(container) != len(content):
        return False
    if isinstance(container, set):
        return {id(item) for item in container} == {id(item) for item in content}
    if isinstance(container, dict):
        values = map(is_, container.values(), content.values())
        return all(values) and all(map(is_, container, content))
    return all(map(is_, container, content))

"""The attributes of a module that training may change, and whether it has changed them, also in place."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from functools import cached_property
from operator import is_
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fedhaw.clients.packed import SCALARS

MISSING = object()
"""The value of an attribute that does not exist."""

MAX_ARRAY_BYTES = 1 << 20
"""The size up to which changes of a NumPy array in place are noticed, for which it has to be read."""

_LIBRARIES = ("torch", "torchmetrics", "lightning", "pytorch_lightning")
_INTERNAL = frozenset(vars(pl.LightningModule())) | {"log"}


class TensorContent:
    """The content of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.value = tensor
        self.version = tensor._version
        self.content = tensor.detach().to("cpu", copy=True)

    @property
    def is_changed(self) -> bool:
        """Whether the tensor was written to."""
        return self.value._version != self.version

    def restore(self) -> None:
        """Put the content back."""
        if self.is_changed:
            self.value.detach().copy_(self.content)
            self.version = self.value._version


class ArrayContent:
    """The content of a NumPy array."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.value = array
        self.content = array.copy()

    @property
    def is_changed(self) -> bool:
        """Whether the array holds other bytes."""
        return self.value.tobytes() != self.content.tobytes()

    def restore(self) -> None:
        """Put the content back."""
        if self.is_changed:
            self.value[...] = self.content


class ContainerContent:
    """The items of a list, deque, dict or set; the very objects, in their order."""

    def __init__(self, container: Any) -> None:
        self.value = container
        self.content = items_of(container)

    @property
    def is_changed(self) -> bool:
        """Whether the container holds other objects."""
        if len(self.value) != len(self.content):
            return True
        if isinstance(self.content, set):
            return bool(self.value != self.content)
        if isinstance(self.content, dict):
            are_values = all(map(is_, self.value.values(), self.content.values()))
            return not are_values or not all(map(is_, self.value, self.content))
        return not all(map(is_, self.value, self.content))

    def restore(self) -> None:
        """Put the items back."""
        if self.is_changed:
            refill(self.value, self.content)


Content = TensorContent | ArrayContent | ContainerContent


class Watched(NamedTuple):
    """An attribute as it was at one time.

    Attributes:
        value: Its value.
        contents: The contents of all that can be changed in place in it.
    """

    value: object
    contents: tuple[Content, ...] = ()

    def is_changed(self, present: object) -> bool:
        """Return whether the attribute has another value, or was changed in place."""
        if present is not self.value:
            # An equal number or string is no change.
            return type(present) is not type(self.value) or type(present) not in SCALARS or present != self.value
        return any(content.is_changed for content in self.contents)

    def items(self) -> dict[int, Any]:
        """Return the items of all containers in it, by the identity of the container."""
        items = {}
        for content in self.contents:
            if isinstance(content, ContainerContent):
                items[id(content.value)] = content.content
        return items


class Watcher:
    """Finds the attributes of a module that training may change, and watches them.

    These are the attributes of the module and its layers, apart from layers of PyTorch's and torchmetrics' own, and
    from Lightning's internals.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.holders: dict[str, dict[str, Any]] = {}
        for path, submodule in module.named_modules():
            library = type(submodule).__module__.partition(".")[0]
            if library not in _LIBRARIES and not isinstance(submodule, Metric):
                self.holders[path] = vars(submodule)
        self._tensors: dict[int, TensorContent] = {}
        # The memory of parameters and buffers, whose changes are noticed elsewhere.
        self._model_storages: frozenset[int] = frozenset()

    def names(self, path: str) -> Iterator[str]:
        """Yield the names of the attributes that a layer has at present."""
        for name in self.holders[path]:
            if name not in _INTERNAL:
                yield name

    def added(self, path: str, earlier: Mapping[str, Watched]) -> list[str]:
        """List the attributes that a layer has got since then, without those that its class computes and keeps.

        Args:
            path: The layer.
            earlier: Its attributes at that time.
        """
        names = [name for name in self.names(path) if name not in earlier]
        if not names:
            # As almost always: the layer need not be looked up.
            return names
        owner = type(self.module.get_submodule(path))
        added = []
        for name in names:
            if not isinstance(getattr(owner, name, None), cached_property):
                added.append(name)
        return added

    def watch_all(self) -> dict[str, dict[str, Watched]]:
        """Watch all attributes from now on, by layer and name."""
        # Tensors that were copied before are copied again only if they have changed.
        earlier = self._tensors
        self._tensors = {}
        self._model_storages = _storages(self.module)
        watched = {}
        for path, holder in self.holders.items():
            watched[path] = {name: self.watch(holder[name], earlier) for name in self.names(path)}
        return watched

    def watch(self, value: object, earlier: Mapping[int, TensorContent] | None = None) -> Watched:
        """Watch one value from now on.

        Args:
            value: The value.
            earlier: The contents of tensors that were copied before.
        """
        if type(value) in SCALARS:
            return Watched(value)
        contents: list[Content] = []
        self._collect(value, earlier or {}, contents, set())
        return Watched(value, tuple(contents))

    def _collect(
        self, value: object, earlier: Mapping[int, TensorContent], contents: list[Content], visited: set[int]
    ) -> None:
        """Add the contents of all that can be changed in place in a value.

        Args:
            value: The value.
            earlier: The contents of tensors that were copied before.
            contents: Receives them.
            visited: The identities of the containers that were visited, as containers may hold themselves.
        """
        if type(value) in SCALARS or id(value) in visited:
            return
        if isinstance(value, Tensor):
            if _is_watchable(value, self._model_storages):
                content = earlier.get(id(value))
                if content is None or content.value is not value or content.is_changed:
                    content = TensorContent(value)
                self._tensors[id(value)] = content
                contents.append(content)
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and value.nbytes <= MAX_ARRAY_BYTES and not value.dtype.hasobject:
                contents.append(ArrayContent(value))
        elif isinstance(value, (list, tuple, deque, dict, set)):
            visited.add(id(value))
            if not isinstance(value, tuple):
                contents.append(ContainerContent(value))
            items = value.values() if isinstance(value, dict) else value
            for item in list(items):
                self._collect(item, earlier, contents, visited)


def items_of(container: Any) -> Any:
    """Copy a container's items, without what else it is."""
    if isinstance(container, dict):
        return dict(container)
    if isinstance(container, set):
        return set(container)
    return list(container)


def refill(container: Any, content: Any) -> None:
    """Replace a container's items."""
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)


def _storages(module: nn.Module) -> frozenset[int]:
    """Return the addresses of the memory of parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    pointers = set()
    for tensor in tensors:
        # A sparse tensor is not in one piece.
        if tensor.layout == torch.strided:
            pointers.add(tensor.untyped_storage().data_ptr())
    return frozenset(pointers)


def _is_watchable(tensor: Tensor, model_storages: frozenset[int]) -> bool:
    """Return whether a tensor's changes are noticed here; those of parameters and buffers are noticed elsewhere."""
    if type(tensor) is not Tensor or tensor.is_inference() or tensor.layout != torch.strided:
        return False
    return tensor.untyped_storage().data_ptr() not in model_storages

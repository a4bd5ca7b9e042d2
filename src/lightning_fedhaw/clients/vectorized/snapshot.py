"""What a module holds, and what its step can reach beside it: to see what a step changes, and to put it back."""

from __future__ import annotations

import inspect
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fedhaw.clients.engine import restore_settings, settings_of
from lightning_fedhaw.clients.vectorized.fingerprint import Fingerprints, Undo
from lightning_fedhaw.clients.vectorized.tracing import is_users, is_users_class
from lightning_fedhaw.vectors.layout import ParameterLayout


class Change(NamedTuple):
    """Something that a step changed and no client may leave behind.

    Attributes:
        what: What it did, as a sentence without its subject.
        is_there: Whether that has happened; cheaper than looking for it.
    """

    what: str
    is_there: Callable[[], bool]


class Attributes:
    """Attributes of a module's layers and classes, and the globals that its step names.

    Args:
        module: The module.
        copies_tensors: Whether tensors and arrays among them are put back, too.
    """

    def __init__(self, module: nn.Module, copies_tensors: bool = True) -> None:
        self.module = module
        self.copies_tensors = copies_tensors
        self.owners = list(_owners(module))
        self.values = [dict(owner.items()) for owner in self.owners]
        self._undo: list[Undo] = []
        self._fingerprints = self._taken(self._undo)

    def _reader(self, undo: list[Undo] | None = None) -> Fingerprints:
        return Fingerprints((*self.module.parameters(), *self.module.buffers()), undo, self.copies_tensors)

    def _taken(self, undo: list[Undo] | None = None) -> list[dict[str, Any]]:
        """Take the fingerprints of all attributes, by owner and name."""
        reader = self._reader(undo)
        return [{name: reader.of(value) for name, value in values.items()} for values in self.values]

    def changed(self) -> Change | None:
        """Name the first attribute that was changed; ``None`` if there is none."""
        for i, owner in enumerate(self.owners):
            now = dict(owner.items())
            for name in {**self._fingerprints[i], **now}:
                if self._is_changed(i, name):
                    return Change(owner.described(name), partial(self._is_changed, i, name))
        return None

    def _is_changed(self, number: int, name: str) -> bool:
        """Whether an attribute of the owner with this number was changed."""
        before = self._fingerprints[number]
        now = dict(self.owners[number].items())
        return name not in before or name not in now or self._reader().of(now[name]) != before[name]

    def restore(self) -> None:
        """Put everything back."""
        for owner, values in zip(self.owners, self.values, strict=True):
            for name in [name for name, _ in owner.items() if name not in values]:
                owner.remove(name)
            for name, value in owner.missing(values):
                owner.put(name, value)
        for undo in self._undo:
            undo()
        # Putting tensors back counts as a change of theirs.
        self._fingerprints = self._taken()


class Snapshot:
    """A module with its tensors, attributes and optimizers.

    Args:
        module: The module.
        optimizers: Its optimizers.
        layout: Its trainable parameters.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], layout: ParameterLayout) -> None:
        self.module = module
        self.optimizers = optimizers
        self.settings = settings_of(optimizers)
        self.tensors = [_TensorState(tensor) for tensor in (*module.parameters(), *module.buffers())]
        self.frozen = list(layout.frozen_tensors(module).items())
        self.trainable = [(name, p, p.requires_grad) for name, p in module.named_parameters()]
        self.dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for submodule in module.modules():
            for kind in ("_parameters", "_buffers", "_modules"):
                holder = vars(submodule)[kind]
                self.dicts.append((holder, dict(holder)))
        self.attributes = Attributes(module)
        self.mark()

    def mark(self) -> None:
        """Take parameters and frozen tensors as they are now for unchanged."""
        trainable = [(name, parameter) for name, parameter, is_trainable in self.trainable if is_trainable]
        self._marked = [_mark(name, tensor) for name, tensor in trainable]
        self._frozen = [_mark(name, tensor) for name, tensor in self.frozen]

    def changed(self) -> Change | None:
        """Name the first thing that a step changed and no client may leave behind; ``None`` if there is none."""
        change = self.attributes.changed()
        if change is not None:
            return change
        what = self._changed_tensor()
        if what is None and repr(settings_of(self.optimizers)) != repr(self.settings):
            what = "changes settings of the optimizer"
        for holder, before in self.dicts:
            if what is None and holder.keys() != before.keys():
                what = "adds or removes parameters, buffers or layers"
        for name, parameter, is_trainable in self.trainable:
            if what is None and parameter.requires_grad != is_trainable:
                what = f"changes whether `{name}` is trainable"
        return None if what is None else Change(what, lambda: self.changed() is not None)

    def _changed_tensor(self) -> str | None:
        for mark in self._frozen:
            if mark.is_changed():
                kind = "parameter" if isinstance(mark.tensor, nn.Parameter) else "buffer"
                return f"changes the frozen {kind} `{mark.name}`"
        for mark in self._marked:
            if mark.is_changed() or self.module.get_parameter(mark.name) is not mark.tensor:
                return f"changes the parameter `{mark.name}` itself"
        return None

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for holder, before in self.dicts:
            if holder.keys() != before.keys() or any(holder[name] is not before[name] for name in before):
                holder.clear()
                holder.update(before)
        for state in self.tensors:
            state.restore()
        for _, parameter, is_trainable in self.trainable:
            parameter.requires_grad_(is_trainable)
        self.attributes.restore()
        restore_settings(self.optimizers, self.settings)
        self.mark()

    @contextmanager
    def cast(self, dtype: torch.dtype) -> Iterator[None]:
        """Hold the module's floating-point tensors in another dtype for a while."""
        moved = [state for state in self.tensors if state.can_move]
        homes = [state.home for state in moved]
        try:
            for state, home in zip(moved, homes, strict=True):
                state.move(home.to(dtype))
            yield
        finally:
            for state, home in zip(moved, homes, strict=True):
                state.move(home)


class _TensorState:
    """A parameter or buffer: its content, and the memory that it lies in."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.home = tensor.detach() if tensor.is_inference() else tensor.data
        self.content = tensor.detach().clone()
        self.can_move = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_inference()

    def move(self, home: Tensor) -> None:
        """Let the tensor lie in other memory, which holds the same content."""
        self.tensor.data = home
        self.home = home

    def restore(self) -> None:
        """Put memory and content back, if they were changed: what was not may be impossible to write to."""
        if self.tensor.is_inference():
            return
        if _pointer(self.tensor) != _pointer(self.home) or self.tensor.shape != self.home.shape:
            self.tensor.data = self.home
        # The version alone does not tell: a normalization's running statistics are changed without a new one.
        if not _is_same(self.tensor, self.content):
            self.tensor.copy_(self.content)


class _Mark(NamedTuple):
    """A tensor as it was at some moment."""

    name: str
    tensor: Tensor
    version: int
    pointer: int

    def is_changed(self) -> bool:
        """Whether it was written to, or put into other memory."""
        return _version(self.tensor) != self.version or _pointer(self.tensor) != self.pointer


def _mark(name: str, tensor: Tensor) -> _Mark:
    return _Mark(name, tensor, _version(tensor), _pointer(tensor))


def _is_same(tensor: Tensor, content: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, NaN included."""
    if tensor.layout != torch.strided:
        return False
    content = content.to(tensor.dtype)
    return torch.equal(tensor, content) or bool((tensor.eq(content) | (tensor.ne(tensor) & content.ne(content))).all())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _pointer(tensor: Tensor) -> int:
    """Return where a tensor's memory begins; 0 for one that is not in one piece."""
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


# ---------------------------------------------------------------------- who holds attributes


class _Owner:
    """Something with named values: an object.

    Args:
        holder: It.
        path: Its name behind ``self``.
    """

    def __init__(self, holder: Any, path: str = "") -> None:
        self.holder = holder
        self.path = path

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield the names and values that a step may change."""
        # `log` is the recorder's while a step runs.
        others = {"_parameters", "_buffers", "_modules", "_trainer", "_fabric", "log"}
        for name, value in vars(self.holder).items():
            if name not in others:
                yield name, value

    def missing(self, values: dict[str, Any]) -> list[tuple[str, Any]]:
        """Return those of earlier values that are no longer there."""
        now = dict(self.items())
        return [(name, value) for name, value in values.items() if name not in now or now[name] is not value]

    def put(self, name: str, value: Any) -> None:
        """Put a value back."""
        vars(self.holder)[name] = value

    def remove(self, name: str) -> None:
        """Remove a value that was added."""
        delattr(self.holder, name)

    def described(self, name: str) -> str:
        """Say that a value was changed."""
        if isinstance(self.holder, Metric):
            return f"updates the torchmetrics object `self.{self.path}`"
        return f"changes `self.{'.'.join(filter(None, (self.path, name)))}`"


class _Class(_Owner):
    """A class of the user's, which may count its objects' steps."""

    def items(self) -> Iterator[tuple[str, Any]]:
        for name, value in vars(self.holder).items():
            if isinstance(value, (int, float, str, list, dict, set, Tensor)) and not name.startswith("__"):
                yield name, value

    def put(self, name: str, value: Any) -> None:
        setattr(self.holder, name, value)


class _Globals(_Owner):
    """Names of a Python module that a step uses."""

    def __init__(self, holder: dict[str, Any], names: set[str]) -> None:
        super().__init__(holder)
        self.names = names

    def items(self) -> Iterator[tuple[str, Any]]:
        for name in sorted(self.names):
            if name in self.holder and _may_hold_state(self.holder[name]):
                yield name, self.holder[name]

    def put(self, name: str, value: Any) -> None:
        self.holder[name] = value

    def remove(self, name: str) -> None:
        del self.holder[name]

    def described(self, name: str) -> str:
        return f"changes the global `{name}`"


class _Closure(_Owner):
    """Variables of the function that a step was written in."""

    def __init__(self, names: Sequence[str], cells: Sequence[CellType]) -> None:
        super().__init__(dict(zip(names, cells, strict=True)))

    def items(self) -> Iterator[tuple[str, Any]]:
        for name, cell in self.holder.items():
            try:
                value = cell.cell_contents
            except ValueError:  # not set yet
                continue
            if _may_hold_state(value):
                yield name, value

    def put(self, name: str, value: Any) -> None:
        self.holder[name].cell_contents = value

    def remove(self, name: str) -> None:
        """Leave a variable that was set: nobody has read it before."""

    def described(self, name: str) -> str:
        return f"changes the variable `{name}` around it"


def _owners(module: nn.Module) -> Iterator[_Owner]:
    """Yield all whose attributes a step may change."""
    for path, submodule in module.named_modules():
        yield _Owner(submodule, path)
    for base in type(module).__mro__:
        if is_users_class(base):
            yield _Class(base)
    yield from _reached(module)


def _reached(module: nn.Module) -> Iterator[_Owner]:
    """Yield globals and closures of ``training_step`` and of the user's functions that it calls by their names."""
    step: Any = module.training_step
    first = inspect.unwrap(getattr(step, "__func__", step))
    pending = [first]
    seen = set()
    names_in: dict[int, _Globals] = {}
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or function in seen or not is_users(function.__code__.co_filename):
            continue
        seen.add(function)
        if function.__closure__:
            yield _Closure(function.__code__.co_freevars, function.__closure__)
        namespace = names_in.setdefault(id(function.__globals__), _Globals(function.__globals__, set()))
        for name in _names(function.__code__):
            value: Any
            for value in (function.__globals__.get(name), inspect.getattr_static(module, name, None)):
                if isinstance(value, FunctionType):
                    pending.append(cast(FunctionType, inspect.unwrap(value)))
            if name in function.__globals__:
                namespace.names.add(name)
    yield from names_in.values()


def _names(code: CodeType) -> set[str]:
    """Return all names that a function uses, with the functions inside of it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _may_hold_state(value: Any) -> bool:
    """Whether a global may be a step's memory: a value, a container, or an object of a class of the user's."""
    plain = (int, float, str, list, tuple, dict, set, deque, itertools.count, Tensor, np.ndarray)
    generators = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    return isinstance(value, (*plain, *generators)) or is_users_class(type(value))

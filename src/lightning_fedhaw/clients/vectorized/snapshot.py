"""Snapshots of a module and of the values that its step can reach, to detect and to undo what a step changes."""

from __future__ import annotations

import inspect
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fedhaw.clients.optimizer_states import restore_settings, settings_of
from lightning_fedhaw.clients.vectorized.fingerprint import Fingerprint, Fingerprints, Undo, holds
from lightning_fedhaw.clients.vectorized.tracing import is_users, is_users_class
from lightning_fedhaw.vectors.layout import ParameterLayout

# Tensors and layers are compared elsewhere; the trainer is shared; `log` is the recorder's while a step runs.
_EXCLUDED = frozenset({"_parameters", "_buffers", "_modules", "_trainer", "_fabric", "log"})


class Change(NamedTuple):
    """A change that a step made and that would pass from client to client.

    Attributes:
        description: A sentence about the step, without its subject.
        has_happened: Returns whether the change is there, at less cost than a search for any change.
    """

    description: str
    has_happened: Callable[[], bool]


class Attributes:
    """A snapshot of the attributes of a module's layers and classes, and of the globals that its step names.

    Args:
        module: The module.
        copies_tensors: Whether tensors and arrays among them are restored, too.
        globals_too: Whether the globals are among them, and the variables around the step.
        looks_into: Whether the attributes of an object are looked at. Default: those of any but a few large kinds.
        left_out: Tensors of which no copies are kept.
    """

    def __init__(
        self,
        module: nn.Module,
        copies_tensors: bool = True,
        *,
        globals_too: bool = True,
        looks_into: Callable[[object], bool] | None = None,
        left_out: Iterable[Tensor] = (),
    ) -> None:
        self.module = module
        self.left_out = tuple(left_out)
        self.copies_tensors = copies_tensors
        self.looks_into = looks_into
        self.owners = list(_layers_and_classes(module))
        if globals_too:
            self.owners += _namespaces(module)
        self.values = [dict(owner.items()) for owner in self.owners]
        self._undo: list[Undo] = []
        self._fingerprints = self._take_fingerprints(self._undo)

    def _reader(self, undo: list[Undo] | None = None) -> Fingerprints:
        other_tensors = (*self.module.parameters(), *self.module.buffers(), *self.left_out)
        return Fingerprints(other_tensors, undo, self.copies_tensors, self.looks_into)

    def _take_fingerprints(self, undo: list[Undo] | None = None) -> list[dict[str, Fingerprint]]:
        """Take the fingerprints of all attributes, by owner and name."""
        reader = self._reader(undo)
        fingerprints = []
        for values in self.values:
            fingerprints.append({name: reader.of(value) for name, value in values.items()})
        return fingerprints

    def changed(self) -> Change | None:
        """Find the first attribute that was changed, added or removed; ``None`` if there is none."""
        reader = self._reader()
        for number, owner in enumerate(self.owners):
            fingerprints = self._fingerprints[number]
            present = dict(owner.items())
            for name in {**fingerprints, **present}:
                if _is_changed(name, fingerprints, present, reader):
                    return Change(owner.describe_change(name), partial(self._has_changed, number, name))
        return None

    def _has_changed(self, number: int, name: str) -> bool:
        """Return whether an attribute of the owner with this number was changed."""
        present = dict(self.owners[number].items())
        return _is_changed(name, self._fingerprints[number], present, self._reader())

    def restore(self) -> None:
        """Restore everything."""
        self.put_back()
        # Restored tensors have new versions, and with them new fingerprints.
        self._fingerprints = self._take_fingerprints()

    def put_back(self) -> None:
        """Restore everything, where nothing asks for changes afterwards."""
        for owner, values in zip(self.owners, self.values, strict=True):
            present = dict(owner.items())
            if holds(present, values):
                continue
            for name in present:
                if name not in values:
                    owner.remove(name)
            for name, value in values.items():
                if name not in present or present[name] is not value:
                    owner.put(name, value)
        for undo in self._undo:
            undo()


def _is_changed(
    name: str, fingerprints: Mapping[str, Fingerprint], present: Mapping[str, object], reader: Fingerprints
) -> bool:
    """Return whether an attribute was changed, added or removed.

    Args:
        name: Its name.
        fingerprints: The fingerprints of its owner's attributes as they were.
        present: The owner's attributes as they are.
        reader: Takes fingerprints.
    """
    if name not in fingerprints or name not in present:
        return True
    return reader.of(present[name]) != fingerprints[name]


class Snapshot:
    """A snapshot of a module with its tensors, attributes and optimizers.

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
        self.trainability = [(name, p, p.requires_grad) for name, p in module.named_parameters()]
        self.dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for submodule in module.modules():
            for kind in ("_parameters", "_buffers", "_modules"):
                holder = vars(submodule)[kind]
                self.dicts.append((holder, dict(holder)))
        self.attributes = Attributes(module)
        self.mark()

    def mark(self) -> None:
        """Take the present parameters and frozen tensors for unchanged."""
        self._marked_parameters = []
        for name, parameter, is_trainable in self.trainability:
            if is_trainable:
                self._marked_parameters.append(_mark(name, parameter))
        self._marked_frozen = [_mark(name, tensor) for name, tensor in self.frozen]

    def changed(self) -> Change | None:
        """Find the first change that would pass from client to client; ``None`` if there is none."""
        change = self.attributes.changed()
        if change is not None:
            return change
        description = self._changed_tensor() or self._changed_structure()
        if description is None:
            return None
        return Change(description, lambda: self.changed() is not None)

    def _changed_tensor(self) -> str | None:
        for mark in self._marked_frozen:
            if mark.is_changed():
                kind = "parameter" if isinstance(mark.tensor, nn.Parameter) else "buffer"
                return f"changes the frozen {kind} `{mark.name}`"
        for mark in self._marked_parameters:
            if mark.is_changed() or self.module.get_parameter(mark.name) is not mark.tensor:
                return f"changes the parameter `{mark.name}` itself"
        return None

    def _changed_structure(self) -> str | None:
        # By their texts: options may be tensors, which `==` compares element by element.
        if repr(settings_of(self.optimizers)) != repr(self.settings):
            return "changes settings of the optimizer"
        for holder, content in self.dicts:
            if holder.keys() != content.keys():
                return "adds or removes parameters, buffers or layers"
        for name, parameter, is_trainable in self.trainability:
            if parameter.requires_grad != is_trainable:
                return f"changes whether `{name}` is trainable"
        return None

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything."""
        for holder, content in self.dicts:
            if holder.keys() != content.keys() or any(holder[name] is not content[name] for name in content):
                holder.clear()
                holder.update(content)
        for state in self.tensors:
            state.restore()
        for _, parameter, is_trainable in self.trainability:
            parameter.requires_grad_(is_trainable)
        self.attributes.restore()
        restore_settings(self.optimizers, self.settings)
        self.mark()

    @contextmanager
    def cast(self, dtype: torch.dtype) -> Iterator[None]:
        """Hold the module's floating-point tensors in another dtype inside the context."""
        states = [state for state in self.tensors if state.can_move]
        memories = [state.memory for state in states]
        try:
            for state, memory in zip(states, memories, strict=True):
                state.move(memory.to(dtype))
            yield
        finally:
            for state, memory in zip(states, memories, strict=True):
                state.move(memory)


class _TensorState:
    """The state of a parameter or buffer: its content, and its memory.

    Attributes:
        memory: A tensor over the memory that the parameter or buffer should lie in.
        content: A copy of its content.
        can_move: Whether it can be put into other memory.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        # An inference tensor has no `data` that could be assigned.
        self.memory = tensor.detach() if tensor.is_inference() else tensor.data
        self.content = tensor.detach().clone()
        self.can_move = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_inference()

    def move(self, memory: Tensor) -> None:
        """Put the tensor into other memory, which holds the same content."""
        self.tensor.data = memory
        self.memory = memory

    def restore(self) -> None:
        """Restore memory and content if they were changed; an unchanged tensor may be impossible to write to."""
        if self.tensor.is_inference():
            return
        if _pointer(self.tensor) != _pointer(self.memory) or self.tensor.shape != self.memory.shape:
            self.tensor.data = self.memory
        # The version is not enough: a normalization changes its running statistics without a new one.
        if not _is_same(self.tensor, self.content):
            self.tensor.copy_(self.content)


class _Mark(NamedTuple):
    """A tensor at some moment: its version, and the address of its memory."""

    name: str
    tensor: Tensor
    version: int
    pointer: int

    def is_changed(self) -> bool:
        """Return whether the tensor was written to, or put into other memory."""
        return _version(self.tensor) != self.version or _pointer(self.tensor) != self.pointer


def _mark(name: str, tensor: Tensor) -> _Mark:
    return _Mark(name, tensor, _version(tensor), _pointer(tensor))


def _is_same(tensor: Tensor, content: Tensor) -> bool:
    """Return whether two tensors of one shape hold the same numbers, NaN included."""
    if tensor.layout != torch.strided:
        return False
    content = content.to(tensor.dtype)
    if torch.equal(tensor, content):
        return True
    # NaN is the number that differs from itself.
    are_both_nan = tensor.ne(tensor) & content.ne(content)
    return bool((tensor.eq(content) | are_both_nan).all())


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written to; 0 for an inference tensor, which does not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _pointer(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; 0 for one that is not in one piece, such as a sparse tensor."""
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


# ---------------------------------------------------------------------- the owners of attributes


class _Owner:
    """An owner of named values: an object with attributes.

    Args:
        holder: The object.
        path: The object's name after ``self``.
    """

    def __init__(self, holder: Any, path: str = "") -> None:
        self.holder = holder
        self.path = path

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield the names and values that a step may change."""
        for name, value in vars(self.holder).items():
            if name not in _EXCLUDED:
                yield name, value

    def put(self, name: str, value: object) -> None:
        """Restore a value."""
        vars(self.holder)[name] = value

    def remove(self, name: str) -> None:
        """Remove a value that was added."""
        delattr(self.holder, name)

    def describe_change(self, name: str) -> str:
        """Say that a value was changed, in a sentence about the step without its subject."""
        if isinstance(self.holder, Metric):
            return f"updates the torchmetrics object `self.{self.path}`"
        if self.path:
            name = f"{self.path}.{name}"
        return f"changes `self.{name}`"


class _Class(_Owner):
    """A class of the user's, whose attributes all its objects share."""

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield attributes that may hold state, and none of the methods."""
        for name, value in vars(self.holder).items():
            if isinstance(value, (int, float, str, list, dict, set, Tensor)) and not name.startswith("__"):
                yield name, value

    def put(self, name: str, value: object) -> None:
        """Restore an attribute; the dict of a class is read-only."""
        setattr(self.holder, name, value)


class _Globals(_Owner):
    """The globals of a Python module that a step uses.

    Args:
        holder: The module's namespace.
        names: The names that the step uses.
    """

    def __init__(self, holder: dict[str, Any], names: set[str]) -> None:
        super().__init__(holder)
        self.names = names

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield globals that may hold state."""
        for name in sorted(self.names):
            if name in self.holder and _may_hold_state(self.holder[name]):
                yield name, self.holder[name]

    def put(self, name: str, value: object) -> None:
        """Restore a global."""
        self.holder[name] = value

    def remove(self, name: str) -> None:
        """Remove a global that was added."""
        del self.holder[name]

    def describe_change(self, name: str) -> str:
        """Say that a global was changed."""
        return f"changes the global `{name}`"


class _Closure(_Owner):
    """The variables that a step uses of the function in which it is defined.

    Args:
        names: The variables' names.
        cells: The cells that hold their values.
    """

    def __init__(self, names: Sequence[str], cells: Sequence[CellType]) -> None:
        super().__init__(dict(zip(names, cells, strict=True)))

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield variables that may hold state."""
        for name, cell in self.holder.items():
            try:
                value = cell.cell_contents
            except ValueError:
                # The variable is not set yet.
                continue
            if _may_hold_state(value):
                yield name, value

    def put(self, name: str, value: object) -> None:
        """Restore a variable."""
        self.holder[name].cell_contents = value

    def remove(self, name: str) -> None:
        """Do nothing: a variable that was not set before cannot have been read."""

    def describe_change(self, name: str) -> str:
        """Say that a variable was changed."""
        return f"changes the variable `{name}` around it"


def _layers_and_classes(module: nn.Module) -> Iterator[_Owner]:
    """Yield the layers of a module and the user's classes of it, whose attributes a step may change."""
    for path, submodule in module.named_modules():
        yield _Owner(submodule, path)
    for base in type(module).__mro__:
        if is_users_class(base):
            yield _Class(base)


def _namespaces(module: nn.Module) -> Iterator[_Owner]:
    """Yield globals and closures of ``training_step`` and of the user's functions that it calls by their names."""
    # One owner for each Python module, however many of its functions are called.
    globals_of: dict[int, _Globals] = {}
    for function in _functions(module):
        if function.__closure__:
            yield _Closure(function.__code__.co_freevars, function.__closure__)
        namespace = globals_of.setdefault(id(function.__globals__), _Globals(function.__globals__, set()))
        namespace.names |= _names(function.__code__) & function.__globals__.keys()
    yield from globals_of.values()


def _functions(module: nn.Module) -> Iterator[FunctionType]:
    """Yield ``training_step``, and the user's functions that it calls by their names."""
    step: Any = module.training_step
    pending = [inspect.unwrap(getattr(step, "__func__", step))]
    visited = set()
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or function in visited:
            continue
        if not is_users(function.__code__.co_filename):
            continue
        visited.add(function)
        yield function
        for name in _names(function.__code__):
            # A name may be that of a global, of a method, or of both.
            value: Any
            for value in (function.__globals__.get(name), inspect.getattr_static(module, name, None)):
                if isinstance(value, FunctionType):
                    pending.append(cast(FunctionType, inspect.unwrap(value)))


def names_in_step(module: nn.Module) -> set[str]:
    """Return all names that ``training_step`` uses, and the user's functions that it calls by their names."""
    names = set()
    for function in _functions(module):
        names |= _names(function.__code__)
    return names


def _names(code: CodeType) -> set[str]:
    """Return all names that a function uses, those of functions inside of it included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _may_hold_state(value: Any) -> bool:
    """Return whether a global may hold a step's state: a value, a container, or an object of a class of the user's."""
    plain = (int, float, str, list, tuple, dict, set, deque, itertools.count, Tensor, np.ndarray)
    generators = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    return isinstance(value, (*plain, *generators)) or is_users_class(type(value))

"""Recordings of a batched call: its operations on plain tensors, below ``vmap`` and autograd."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

_PASSING = frozenset(
    {_aten.detach.default, _aten.alias.default, _aten.view.default, _aten.expand.default, _aten._unsafe_view.default}
)
"""Operations whose output is their input, if it has the same shape."""


class Value(NamedTuple):
    """A tensor of a recording.

    Attributes:
        number: Its number: first the inputs, then what the operations made, in their order.
    """

    number: int


class Constant(NamedTuple):
    """A tensor that the step had from elsewhere, such as a frozen parameter or a number that was made a tensor.

    Attributes:
        number: Its number among those of the recording: -1, -2 and so on, since no :class:`Value` may be equal to it.
    """

    number: int


class Rows(NamedTuple):
    """An integer that is a multiple of the number of rows.

    Attributes:
        multiple: The factor.
    """

    multiple: int


class Operation(NamedTuple):
    """An operation of a recording.

    Attributes:
        function: What was called.
        arguments: The list of its positional arguments, and the dict of the others; with a :class:`Value` or
            :class:`Constant` for each tensor.
        made: The numbers of the tensors that it made, in the order of its outputs; ``None`` for a tensor that was there
            before, and for an output that is none.
        passes: Whether its only output is its first argument.
    """

    function: OpOverload
    arguments: Any
    made: tuple[int | None, ...]
    passes: bool


class DifferenceError(Exception):
    """The error of two recordings that are not of one program."""


class NotRepeatableError(Exception):
    """The error of a call that does something other than a fixed sequence of operations on tensors."""


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that records the operations of a call that is made inside of it.

    Args:
        rows: The number of rows of the call.
        inputs: The tensors that it is given.

    Attributes:
        operations: The operations, in their order.
        constants: The tensors from elsewhere.
        made_of_numbers: Those of them that were made of Python numbers in this call.
        outputs: The tensors that the call gave, as :meth:`finish` was told.
        obstacle: Why the call cannot be repeated from its operations; ``None`` if it can be.
    """

    def __init__(self, rows: int, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.num_inputs = len(inputs)
        self.operations: list[Operation] = []
        self.constants: list[Tensor] = []
        self.made_of_numbers: set[Constant] = set()
        self.outputs: Any = None
        self.obstacle: str | None = None
        # Without owning the tensors, so that a recorded call needs no more memory than any other.
        self._numbers: dict[int, _Numbered] = {}
        self._num_values = 0
        for tensor in inputs:
            if self._number_of(tensor) is None:
                self._numbers[id(tensor)] = _Numbered(weakref.ref(tensor), self._num_values)
            self._num_values += 1

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.obstacle is None:
            try:
                self._add(func, args, kwargs, result)
            except NotRepeatableError as error:
                self.obstacle = str(error)
        return result

    def _add(self, function: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object) -> None:
        """Record an operation.

        Raises:
            NotRepeatableError: If it gives a number to Python, or changes more of a tensor than its elements.
        """
        if _changes_shape(function):
            raise NotRepeatableError(f"{function} changes the shape of a tensor in place")
        arguments = [self._described(args), self._described(kwargs)]
        if function is _aten.lift_fresh.default and isinstance(arguments[0][0], Constant):
            self.made_of_numbers.add(arguments[0][0])
        made: tuple[int | None, ...]
        if isinstance(result, (tuple, list)):
            made = tuple(self._numbered(output, function) for output in result)
        else:
            made = (self._numbered(result, function),)
        passes = function in _PASSING and _is_alike(args[0], result)
        self.operations.append(Operation(function, arguments, made, passes))

    def _numbered(self, output: object, function: OpOverload) -> int | None:
        """Number an output of an operation."""
        if output is None:
            return None
        if not isinstance(output, Tensor):
            raise NotRepeatableError(f"{function} gives Python a {type(output).__name__}")
        if self._number_of(output) is not None:
            # It was changed in place.
            return None
        number = self._num_values
        self._numbers[id(output)] = _Numbered(weakref.ref(output), number)
        self._num_values += 1
        return number

    def _number_of(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor; ``None`` if it has none."""
        numbered = self._numbers.get(id(tensor))
        # Another tensor may have been at its address before.
        if numbered is None or numbered.tensor() is not tensor:
            return None
        return numbered.number

    def _described(self, argument: object) -> Any:
        """Replace the tensors in an argument by their numbers.

        Raises:
            NotRepeatableError: If there is a random generator in it, whose seed is that of a single round.
        """
        if isinstance(argument, Tensor):
            number = self._number_of(argument)
            if number is None:
                return self._constant(argument)
            return Value(number)
        if argument is None or type(argument) in (int, bool, float):
            return argument
        if isinstance(argument, (list, tuple)):
            return [self._described(entry) for entry in argument]
        if isinstance(argument, Mapping):
            return {name: self._described(entry) for name, entry in argument.items()}
        if isinstance(argument, torch.Generator):
            raise NotRepeatableError("a random generator is drawn from")
        return argument

    def _constant(self, tensor: Tensor) -> Constant:
        for number, constant in enumerate(self.constants, start=1):
            if constant is tensor:
                return Constant(-number)
        self.constants.append(tensor)
        return Constant(-len(self.constants))

    def finish(self, outputs: object) -> None:
        """Note what the call gave.

        Args:
            outputs: Tensors in lists, tuples and dicts.
        """
        if self.obstacle is None:
            try:
                self.outputs = self._described(outputs)
            except NotRepeatableError as error:
                self.obstacle = str(error)


class _Numbered(NamedTuple):
    """A tensor with its number, without owning it."""

    tensor: weakref.ref[Tensor]
    number: int


@cache
def _changes_shape(function: OpOverload) -> bool:
    """Return whether a function changes more of a tensor than its elements."""
    return torch.Tag.inplace_view in function.tags


def _is_alike(source: Tensor, output: object) -> bool:
    """Return whether an output has the elements of a tensor in the same order of memory."""
    assert isinstance(output, Tensor)
    return source.shape == output.shape and source.stride() == output.stride()


class Pattern:
    """A program that recordings of calls agree on, for any number of rows once they had different numbers.

    Args:
        recording: A first recording.

    Attributes:
        operations: The operations; an integer among their arguments that grows with the rows is a :class:`Rows`.
        rows: The number of rows that it is for; ``None`` for any.
    """

    def __init__(self, recording: Recording) -> None:
        self.operations: Sequence[Operation] = recording.operations
        self.constants: Sequence[Tensor] = recording.constants
        self.made_of_numbers = recording.made_of_numbers
        self.outputs = recording.outputs
        self.num_inputs = recording.num_inputs
        self.rows: int | None = recording.rows

    def confirm(self, recording: Recording) -> None:
        """Learn from another recording.

        Raises:
            DifferenceError: If it is not of the same program.
        """
        if len(recording.operations) != len(self.operations) or not self._has_constants_of(recording):
            raise DifferenceError
        join = _Join(self.rows, recording.rows)
        operations = []
        for old, new in zip(self.operations, recording.operations, strict=True):
            if (old.function, old.made, old.passes) != (new.function, new.made, new.passes):
                raise DifferenceError
            # Most are equal as they are, which is quickly found out.
            if old.arguments != new.arguments:
                old = old._replace(arguments=join(old.arguments, new.arguments))
            operations.append(old)
        join(self.outputs, recording.outputs)
        self.operations = operations
        if recording.rows != self.rows:
            self.rows = None

    def _has_constants_of(self, recording: Recording) -> bool:
        """Return whether a recording had the same tensors from elsewhere, or made them of equal numbers."""
        if len(self.constants) != len(recording.constants) or self.made_of_numbers != recording.made_of_numbers:
            return False
        for number, (old, new) in enumerate(zip(self.constants, recording.constants, strict=True), start=1):
            if old is new:
                continue
            # Any other tensor that is new in every call may have been computed from the inputs in a hidden way.
            if Constant(-number) not in self.made_of_numbers or not _is_equal(old, new):
                return False
        return True


def _is_equal(old: Tensor, new: Tensor) -> bool:
    """Return whether two tensors have the same numbers, bit for bit."""
    if (old.dtype, old.device, old.shape, old.stride()) != (new.dtype, new.device, new.shape, new.stride()):
        return False
    return torch.equal(old, new)


class _Join:
    """Joins the arguments of two recordings of one program.

    Args:
        old_rows: The number of rows of the old one; ``None`` if it is a pattern for any.
        new_rows: The number of rows of the new one.
    """

    def __init__(self, old_rows: int | None, new_rows: int) -> None:
        self.old_rows = old_rows
        self.new_rows = new_rows

    def __call__(self, old: Any, new: Any) -> Any:
        """Return an argument of the pattern.

        Raises:
            DifferenceError: If they differ in more than a multiple of the rows.
        """
        if isinstance(old, Rows):
            return self._rows(old.multiple, new)
        if type(old) is not type(new):
            raise DifferenceError
        if isinstance(old, (Value, Constant)):
            self._check(old == new)
            return old
        if isinstance(old, (list, tuple)):
            self._check(len(old) == len(new))
            return [self(old_entry, new_entry) for old_entry, new_entry in zip(old, new, strict=True)]
        if isinstance(old, dict):
            self._check(old.keys() == new.keys())
            return {name: self(old[name], new[name]) for name in old}
        if type(old) is int and old != new:
            self._check(self.old_rows is not None and old % self.old_rows == 0)
            assert self.old_rows is not None
            return self._rows(old // self.old_rows, new)
        # Text, because NaN is not equal to itself.
        self._check(repr(old) == repr(new))
        return old

    def _rows(self, multiple: int, new: object) -> Rows:
        self._check(type(new) is int and new == multiple * self.new_rows)
        return Rows(multiple)

    @staticmethod
    def _check(holds: bool) -> None:
        if not holds:
            raise DifferenceError

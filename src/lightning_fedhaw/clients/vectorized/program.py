"""Programs that repeat the operations of recorded calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from lightning_fedhaw.clients.vectorized.recording import Constant, Operation, Pattern, Rows, Value

Program = Callable[[int, Sequence[Tensor]], Any]
"""A function of the number of rows and the inputs of a call, which returns its outputs."""


def program_of(pattern: Pattern) -> Program:
    """Write a pattern as a function: one line for each operation that its outputs depend on."""
    return _Writer(pattern).write()


class _Writer:
    """Writes a pattern as a function.

    Args:
        pattern: The pattern.
    """

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        # The objects that the text names: functions, constants, dtypes and so on.
        self.objects: dict[str, Any] = {}
        # By number of a value: the number of the value that it is the same as.
        self.same_as: dict[int, int | Constant] = {}

    def write(self) -> Program:
        """Write the function, and compile it."""
        needed: set[int] = set()
        self._note_passing()
        self._values_in(self.pattern.outputs, needed)
        lines = [f"    return {self._text(self.pattern.outputs)}"]
        # From the end, where the operations are known whose results are used later.
        for operation in reversed(self.pattern.operations):
            if operation.passes:
                continue
            made = {number for number in operation.made if number is not None}
            if not made & needed and not operation.function._schema.is_mutable:
                continue
            used: set[int] = set()
            self._values_in(operation.arguments, used)
            # What is used here for the last time is released, as autograd releases it.
            released = sorted(number for number in used | made if number not in needed)
            released = [number for number in released if number >= self.pattern.num_inputs]
            if released:
                lines.append("    del " + ", ".join(f"v{number}" for number in released))
            lines.append("    " + self._line(operation))
            needed |= used
        names = "".join(f"v{number}, " for number in range(self.pattern.num_inputs))
        text = "\n".join(["def program(rows, inputs):", f"    {names}= inputs", *reversed(lines)])
        exec(compile(text, "<the operations of a batched step>", "exec"), self.objects)
        program: Program = self.objects["program"]
        return program

    def _note_passing(self) -> None:
        """Note the values that are the same as others."""
        for operation in self.pattern.operations:
            number = operation.made[0]
            if operation.passes and number is not None:
                source = operation.arguments[0][0]
                if isinstance(source, Value):
                    source = self.same_as.get(source.number, source.number)
                self.same_as[number] = source

    def _line(self, operation: Operation) -> str:
        """Write an operation."""
        function = operation.function
        if function is torch.ops.aten.lift_fresh.default:
            # It gives its argument itself, which an operation in place would change for all later calls.
            function = torch.ops.aten.lift_fresh_copy.default
        positional, named = operation.arguments
        arguments = [self._text(argument) for argument in positional]
        arguments += [f"{name}={self._text(argument)}" for name, argument in named.items()]
        call = f"{self._object(function)}({', '.join(arguments)})"
        if _gives_tensor(function):
            (number,) = operation.made
            return call if number is None else f"v{number} = {call}"
        # Some outputs may be none or have been there before.
        targets = ["_" if number is None else f"v{number}" for number in operation.made]
        return f"{''.join(f'{target}, ' for target in targets)}= {call}"

    def _values_in(self, argument: Any, numbers: set[int]) -> None:
        """Add the numbers of the values in an argument to a set."""
        if isinstance(argument, Value):
            number = self.same_as.get(argument.number, argument.number)
            if not isinstance(number, Constant):
                numbers.add(number)
        elif isinstance(argument, list):
            for entry in argument:
                self._values_in(entry, numbers)
        elif isinstance(argument, dict):
            for entry in argument.values():
                self._values_in(entry, numbers)

    def _text(self, argument: Any) -> str:
        """Write an argument."""
        if isinstance(argument, Value):
            number = self.same_as.get(argument.number, argument.number)
            if isinstance(number, Constant):
                return self._text(number)
            return f"v{number}"
        if isinstance(argument, Constant):
            return self._object(self.pattern.constants[-argument.number - 1])
        if isinstance(argument, Rows):
            return f"rows * {argument.multiple}"
        if isinstance(argument, list):
            return f"[{', '.join(map(self._text, argument))}]"
        if isinstance(argument, dict):
            entries = [f"{name!r}: {self._text(entry)}" for name, entry in argument.items()]
            return f"{{{', '.join(entries)}}}"
        is_literal = argument is None or type(argument) in (bool, int, str)
        if is_literal or (type(argument) is float and math.isfinite(argument)):
            return repr(argument)
        return self._object(argument)

    def _object(self, value: object) -> str:
        """Return the name of an object."""
        name = f"object_{id(value)}"
        # It is held by the function, so that no other object gets its `id`.
        self.objects[name] = value
        return name


def _gives_tensor(function: OpOverload) -> bool:
    """Return whether a function returns one tensor, and not several or a list."""
    returns = function._schema.returns
    return len(returns) == 1 and not isinstance(returns[0].type, torch.ListType)

"""Programs that repeat the operations of recorded calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from lightning_fedhaw.clients.vectorized.recording import Constant, Operation, Pattern, Rows, Value

Program = Callable[[int, Sequence[Tensor]], Any]
"""A function of the number of rows and the inputs of a call, which returns its outputs."""


def program_of(pattern: Pattern) -> Program:
    """Write a pattern as a program."""
    return _Writer(pattern).write()


class _Writer:
    """Writes a pattern as a function.

    Args:
        pattern: The pattern.
    """

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.graph = fx.Graph()
        self.rows = self.graph.placeholder("rows")
        self.values: dict[int, fx.Node] = {}
        self.constants: list[fx.Node] = []
        # Of the rows, by factor.
        self.multiples: dict[int, fx.Node] = {1: self.rows}

    def write(self) -> Program:
        """Write all operations, without those that nothing depends on."""
        graph = self.graph
        for number in range(self.pattern.num_inputs):
            self.values[number] = graph.placeholder(f"input_{number}")
        for number in range(len(self.pattern.constants)):
            self.constants.append(graph.placeholder(f"constant_{number}"))
        for operation in self.pattern.operations:
            self._write(operation)
        graph.output(self._argument(self.pattern.outputs))
        graph.eliminate_dead_code()
        function: Callable[..., Any] = fx.GraphModule(nn.Module(), graph).forward
        constants = self.pattern.constants

        def program(rows: int, inputs: Sequence[Tensor]) -> Any:
            return function(rows, *inputs, *constants)

        return program

    def _write(self, operation: Operation) -> None:
        """Write an operation, and bind what it makes."""
        args, kwargs = operation.arguments
        if operation.passes:
            self._bind(operation.made[0], self._argument(args[0]))
            return
        function = operation.function
        if function is torch.ops.aten.lift_fresh.default:
            # It gives its argument itself, which an operation in place would change for all later calls.
            function = torch.ops.aten.lift_fresh_copy.default
        node = self.graph.call_function(function, tuple(self._argument(args)), self._argument(kwargs))
        if _gives_tensor(function):
            self._bind(operation.made[0], node)
            return
        for position, number in enumerate(operation.made):
            if number is not None:
                self._bind(number, self.graph.call_function(operator.getitem, (node, position)))

    def _bind(self, number: int | None, node: fx.Node) -> None:
        if number is not None:
            self.values[number] = node

    def _argument(self, argument: Any) -> Any:
        """Return an argument with nodes for its tensors and for multiples of the rows."""
        if isinstance(argument, Value):
            return self.values[argument.number]
        if isinstance(argument, Constant):
            return self.constants[argument.number]
        if isinstance(argument, Rows):
            if argument.multiple not in self.multiples:
                product = self.graph.call_function(operator.mul, (self.rows, argument.multiple))
                self.multiples[argument.multiple] = product
            return self.multiples[argument.multiple]
        if isinstance(argument, list):
            return [self._argument(entry) for entry in argument]
        if isinstance(argument, dict):
            return {name: self._argument(entry) for name, entry in argument.items()}
        return argument


def _gives_tensor(function: OpOverload) -> bool:
    """Return whether a function returns one tensor, and not several or a list."""
    returns = function._schema.returns
    return len(returns) == 1 and not isinstance(returns[0].type, torch.ListType)

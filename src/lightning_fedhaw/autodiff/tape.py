"""Walks over the tape of ``torch.autograd``: what a value depends on, and a guard for what would lose that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def nodes(values: Iterable[Tensor], is_border: Callable[[Any], bool] = lambda node: False) -> Iterator[Any]:
    """Walk the operations that made some values, each once.

    Args:
        values: Where to start.
        is_border: Whether the walk ends at an operation, which is still yielded.

    Yields:
        The tape's nodes. A leaf's node has it as its ``variable``.
    """
    seen: set[Any] = set()
    waiting = list(last_nodes(values))
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not is_border(node):
            waiting += [parent for parent, _ in node.next_functions]


def last_nodes(values: Iterable[Tensor]) -> set[Any]:
    """Collect the operations that some values are the results of; a leaf of the tape has a node, too."""
    last: set[Any] = set()
    for value in values:
        if value.requires_grad:
            # Not `grad_fn`, which a leaf of the tape lacks.
            last.add(torch.autograd.graph.get_gradient_edge(value).node)
    return last


def leaves(values: Iterable[Tensor]) -> dict[int, Tensor]:
    """Collect the tape's leaves that some values depend on, by their ``id``."""
    variables: dict[int, Tensor] = {}
    for node in nodes(values):
        # Only a node that accumulates the gradient of a leaf has one.
        variable = getattr(node, "variable", None)
        if variable is not None:
            variables[id(variable)] = variable
    return variables


def saved_numbers(values: Iterable[Tensor]) -> int:
    """Count the numbers that the tape of some values keeps."""
    storages: dict[int, int] = {}
    for node in nodes(values):
        for saved in _saved_tensors(node):
            # By memory: several nodes may save views of one tensor.
            storages[saved.untyped_storage()._cdata] = saved.numel()
    return sum(storages.values())


def _saved_tensors(node: Any) -> list[Tensor]:
    # Built-in operations have an attribute for each; a custom `Function` has all in one tuple.
    values: list[Any] = list(getattr(node, "saved_tensors", ()))
    for name in dir(node):
        if name.startswith("_saved_"):
            value = getattr(node, name)
            if isinstance(value, (tuple, list)):
                values += value
            else:
                values.append(value)
    return [value for value in values if isinstance(value, Tensor)]


class DerivativeGuard(TorchFunctionMode):
    """Refuses a gradient that forgets how it depends on what a client received.

    Args:
        received: The values at the client that are being differentiated.
    """

    def __init__(self, received: Sequence[Tensor]) -> None:
        super().__init__()
        self.received = last_nodes(received)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the calls that take gradients; let everything else pass.

        Raises:
            RuntimeError: If a gradient is taken without ``create_graph`` of something that depends on what was
                received.
        """
        kwargs = kwargs or {}
        if func is torch.autograd.grad or func is Tensor.backward:
            call = inspect.signature(func).bind(*args, **kwargs)
            call.apply_defaults()
            if not call.arguments["create_graph"]:
                self._refuse_dependent(call.args[0])
        return func(*args, **kwargs)

    def _refuse_dependent(self, outputs: Any) -> None:
        values = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if self.received.isdisjoint(nodes(values)):
            return
        raise RuntimeError(
            "A client takes a gradient without `create_graph=True`, which forgets how it depends on what the client"
            " received: the derivative of the program would be silently wrong. Take it by `autodiff.gradient`, pass"
            " `create_graph=True`, or `.detach()` what was received if it is meant to be a constant here."
        )

"""Mixed mode: clients send the Jacobian of their message with the message, and nobody is asked again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.autodiff.primitives import Clients, Sum
from lightning_fedhaw.autodiff.trace import Trace


@dataclass(frozen=True, eq=False)
class Source:
    """A server value that clients depend on.

    Attributes:
        value: ``[...]``, at the server, on the server's tape.
        rows: What each client of this process received; its own tape begins there.
    """

    value: Tensor
    rows: tuple[Tensor, ...]


def merged_sources(groups: Iterable[Sequence[Source]]) -> tuple[Source, ...]:
    """Collect the sources of several values, each once."""
    merged: dict[int, Source] = {}
    for group in groups:
        for source in group:
            merged[id(source)] = source
    return tuple(merged.values())


def linearized_sum(leaves: Sequence[Tensor], sources: Sequence[Source], clients: Clients) -> Tensor:
    """Sum messages and their Jacobians over the clients.

    Args:
        leaves: ``[...]`` each, one message per client of this process.
        sources: What the messages may depend on.
        clients: The clients.

    Returns:
        The sum ``[...]``, on the server's tape by the summed Jacobians.
    """
    total: Tensor = Sum.apply(torch.stack([leaf.detach() for leaf in leaves]), clients)
    used: list[Tensor] = []
    jacobians: list[Tensor] = []
    for source in sources:
        if not any(leaf.requires_grad and _depends(leaf, row) for leaf, row in zip(leaves, source.rows, strict=True)):
            continue
        rows = [jacobian(leaf, row) for leaf, row in zip(leaves, source.rows, strict=True)]
        jacobians.append(Sum.apply(torch.stack(rows), clients))
        used.append(source.value)
    if not used:
        return total
    result: Tensor = Linearized.apply(total, len(used), *used, *jacobians)
    return result


def observe_sum(leaf: Tensor, sources: Sequence[Source], clients: Clients, trace: Trace) -> Tensor:
    """Account for a sum over clients, whose result depends on the sources and is not computed.

    Args:
        leaf: One client's message.
        sources: What the message may depend on.
        clients: The clients.
        trace: The account.
    """
    used = [source.value for source in sources if leaf.requires_grad and _depends(leaf, source.rows[0])]
    trace.add_sum(leaf, used)
    clients.traffic.count_sum(leaf.numel())
    total = leaf.detach().clone()
    if used:
        total = Linearized.apply(total, len(used), *used)
    return total


def _depends(leaf: Tensor, row: Tensor) -> bool:
    """Whether a message depends on what a client received, by the client's tape alone."""
    seen: set[Any] = set()
    waiting = [leaf.grad_fn]
    if leaf is row:
        return True
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is row:
            return True
        waiting += [parent for parent, _ in node.next_functions]
    return False


def jacobian(message: Tensor, row: Tensor) -> Tensor:
    """Differentiate a client's message in what it received.

    Args:
        message: ``b`` numbers.
        row: ``a`` numbers, a leaf of the client's tape.

    Returns:
        ``[b, a]``: row by row by reverse mode or, if the inputs are fewer, column by column by its transpose.
    """
    outputs, inputs = message.numel(), row.numel()
    if not message.requires_grad:
        return torch.zeros(outputs, inputs, dtype=row.dtype, device=row.device)
    if outputs <= inputs:
        basis = torch.eye(outputs, dtype=message.dtype, device=message.device)
        rows = [_pullback(message, row, unit.reshape(message.shape)).reshape(-1) for unit in basis]
        return torch.stack(rows)
    # J^T u is linear in u, so its derivative along a direction v of the inputs is J v.
    probe = torch.zeros_like(message, requires_grad=True)
    transposed = _pullback(message, row, probe, create_graph=True)
    columns = []
    for unit in torch.eye(inputs, dtype=row.dtype, device=row.device):
        (column,) = torch.autograd.grad(
            transposed, probe, unit.reshape(row.shape), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        columns.append(column.reshape(-1))
    return torch.stack(columns, dim=1)


def _pullback(message: Tensor, row: Tensor, cotangent: Tensor, *, create_graph: bool = False) -> Tensor:
    (result,) = torch.autograd.grad(
        message,
        row,
        cotangent,
        retain_graph=True,  # the client's tape may be read again, for another message
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return result


class Linearized(torch.autograd.Function):
    """A server value with known Jacobians: its backward is their transpose, and reaches no client."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, count: int, *values: Tensor) -> Tensor:
        """Return the value.

        Args:
            ctx: Autograd's context.
            total: ``[...]``, b numbers.
            count: How many sources there are.
            values: The sources, ``a`` numbers each, and then the Jacobians ``[b, a]``; without Jacobians the value
                only depends on the sources, for a trace.
        """
        ctx.sources = [value.shape for value in values[:count]]
        ctx.save_for_backward(*values[count:])
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Apply the transposed Jacobians."""
        jacobians = ctx.saved_tensors
        flat = gradients[0].reshape(-1)
        pulled = [(flat @ matrix).reshape(shape) for matrix, shape in zip(jacobians, ctx.sources, strict=True)]
        return None, None, *pulled, *[None] * len(jacobians)

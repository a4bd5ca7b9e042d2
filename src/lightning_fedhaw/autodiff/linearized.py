"""Mixed mode: clients send the Jacobian of their message with the message, and nobody is asked again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.autodiff import tape
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
    reached = [tape.leaves([leaf]) for leaf in leaves]
    # A source counts if any client uses it: the Jacobians of all clients are summed.
    used = []
    for source in sources:
        if any(id(row) in known for known, row in zip(reached, source.rows, strict=True)):
            used.append(source)
    if not used:
        return total
    of_clients = []
    for position, leaf in enumerate(leaves):
        of_clients.append(jacobians(leaf, [source.rows[position] for source in used]))
    summed = [Sum.apply(torch.stack(blocks), clients) for blocks in zip(*of_clients, strict=True)]
    values = [source.value for source in used]
    result: Tensor = Linearized.apply(total, len(used), *values, *summed)
    return result


def observe_sum(leaf: Tensor, sources: Sequence[Source], clients: Clients, trace: Trace) -> Tensor:
    """Account for a sum over clients, whose result depends on the sources and is not computed.

    Args:
        leaf: One client's message.
        sources: What the message may depend on.
        clients: The clients.
        trace: The account.
    """
    reached = tape.leaves([leaf])
    values = []
    rows = []
    for source in sources:
        # A trace has one client only.
        row = source.rows[0]
        if id(row) in reached:
            values.append(source.value)
            rows.append(row)
    clients.traffic.count_sum(leaf.numel())
    total = leaf.detach().clone()
    if values:
        total = Linearized.apply(total, len(values), *values)
    trace.add_sum(leaf.numel(), values, rows, total)
    return total


def jacobians(message: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """Differentiate a client's message in what it received.

    Args:
        message: ``b`` numbers.
        rows: ``a`` numbers each, leaves of the client's tape.

    Returns:
        ``[b, a]`` for each, in the wider of the two dtypes: row by row by reverse mode or, if the inputs are fewer,
        column by column by its transpose.
    """
    dtypes = [torch.promote_types(message.dtype, row.dtype) for row in rows]
    if not message.requires_grad:
        blocks = _zeros(message, rows)
    elif message.numel() <= sum(row.numel() for row in rows):
        blocks = _by_rows(message, rows)
    else:
        blocks = _by_columns(message, rows)
    return [block.to(dtype) for block, dtype in zip(blocks, dtypes, strict=True)]


def _zeros(message: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the Jacobians of a message that depends on nothing."""
    blocks = []
    for row in rows:
        blocks.append(torch.zeros(message.numel(), row.numel(), dtype=row.dtype, device=row.device))
    return blocks


def _by_rows(message: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    collected: list[list[Tensor]] = [[] for _ in rows]
    for unit in torch.eye(message.numel(), dtype=message.dtype, device=message.device):
        for block, gradient in zip(collected, _pullback(message, rows, unit.reshape(message.shape)), strict=True):
            block.append(gradient.reshape(-1))
    return [torch.stack(block) for block in collected]


def _by_columns(message: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    # J^T u is linear in u, so its derivative along a direction v of the inputs is J v.
    probe = torch.zeros_like(message, requires_grad=True)
    blocks = []
    for row, transposed in zip(rows, _pullback(message, rows, probe, create_graph=True), strict=True):
        columns = []
        for unit in torch.eye(row.numel(), dtype=row.dtype, device=row.device):
            (column,) = torch.autograd.grad(
                transposed, probe, unit.reshape(row.shape), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            columns.append(column.reshape(-1))
        blocks.append(torch.stack(columns, dim=1))
    return blocks


def _pullback(
    message: Tensor, rows: Sequence[Tensor], cotangent: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        message,
        list(rows),
        cotangent,
        retain_graph=True,  # the client's tape may be read again, for another message
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


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
        ctx.sources = [(value.shape, value.dtype) for value in values[:count]]
        ctx.save_for_backward(*values[count:])
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Apply the transposed Jacobians."""
        jacobians = ctx.saved_tensors
        flat = gradients[0].reshape(-1)
        pulled = []
        for matrix, (shape, dtype) in zip(jacobians, ctx.sources, strict=True):
            pulled.append((flat.to(matrix.dtype) @ matrix).reshape(shape).to(dtype))
        return None, None, *pulled, *[None] * len(jacobians)

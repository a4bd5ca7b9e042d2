"""Values at the clients, and the operations of federated programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_fedhaw.autodiff.linearized import Source, linearized_sum, merged_sources, observe_sum
from lightning_fedhaw.autodiff.primitives import Broadcast, Clients, Sum
from lightning_fedhaw.autodiff.trace import Trace

MIXED: ContextVar[bool] = ContextVar("mixed", default=False)
"""Whether clients differentiate what they send by themselves, instead of leaving that to a pass over the program."""

TRACE: ContextVar[Trace | None] = ContextVar("trace", default=None)
"""The account that a program is traced for, without computing it."""


@dataclass(frozen=True, eq=False)
class Placed:
    """A value at every client (``@clients``); a plain tensor, number or container of these is at the server.

    Attributes:
        values: One value per client of this process, in order.
        clients: The clients.
        sources: In mixed mode, the broadcast values that these depend on.
    """

    values: tuple[Any, ...]
    clients: Clients
    sources: tuple[Source, ...] = ()

    def __len__(self) -> int:
        return len(self.clients)

    def __getitem__(self, item: Any) -> NoReturn:
        _refuse_placed("is indexed at the server")

    def __iter__(self) -> Iterator[Any]:
        _refuse_placed("is iterated over at the server")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """Refuse torch's functions at the server."""
        _refuse_placed(f"is given to `{getattr(func, '__name__', func)}` at the server")

    def _refuse_arithmetic(self, *others: Any) -> NoReturn:
        _refuse_placed("stands in arithmetic at the server")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _refuse_arithmetic
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __neg__ = __float__ = __bool__ = _refuse_arithmetic


def _refuse_placed(what: str) -> NoReturn:
    raise TypeError(
        f"A value at the clients (`Placed`) {what}. Work on it where it is with `map_clients(function, value)`, or"
        " bring it to the server with `sum`, `mean` or `weighted_sum`."
    )


def place(values: Sequence[Any] | Mapping[int, Any] | Callable[[int], Any], clients: Clients) -> Placed:
    """Place values that the clients hold, such as their data.

    Args:
        values: ``K`` values in the clients' order, a mapping from a client's number to its value, or a function of the
            number, which is called for the clients of this process only.
        clients: The clients.

    Raises:
        ValueError: If there are not as many values as clients.
    """
    if callable(values):
        return Placed(tuple(values(client) for client in clients.ids_here), clients)
    if isinstance(values, Mapping):
        missing = [client for client in clients.ids if client not in values]
        if missing:
            raise ValueError(f"`values` must have an entry for every client, and lacks {missing[:10]}.")
        return Placed(tuple(values[client] for client in clients.ids_here), clients)
    if len(values) != len(clients):
        raise ValueError(f"`values` must have one entry for each of the {len(clients)} clients, got {len(values)}.")
    return Placed(tuple(values[slot] for slot in clients.slots_here), clients)


def broadcast(value: Any, clients: Clients) -> Placed:
    """Send a server value to every client.

    Args:
        value: A tensor, a number, or a container of these.
        clients: Who receives it.

    Raises:
        TypeError: If the value is at the clients already.
    """
    leaves, structure = pytree.tree_flatten(value)
    rows: list[Sequence[Any]] = []
    sources: list[Source] = []
    for leaf in leaves:
        if isinstance(leaf, Placed):
            _refuse_placed("is broadcast")
        if not isinstance(leaf, Tensor):
            rows.append([leaf] * len(clients.slots_here))
            continue
        received, source = _received(leaf, clients)
        rows.append(received)
        if source is not None:
            sources.append(source)
    values = [pytree.tree_unflatten(list(leaves_of_client), structure) for leaves_of_client in zip(*rows, strict=True)]
    return Placed(tuple(values), clients, tuple(sources))


def _received(leaf: Tensor, clients: Clients) -> tuple[Sequence[Tensor], Source | None]:
    """What every client receives of one tensor and, in mixed mode, where its own tape begins."""
    trace = TRACE.get()
    is_cut = MIXED.get() and leaf.requires_grad
    stacked = Broadcast.apply(leaf.detach() if is_cut else leaf, clients)
    if trace is not None and clients.is_accounted:
        trace.add_broadcast(leaf)
    if not is_cut:
        return stacked.unbind(0), None
    rows = [row.detach().requires_grad_() for row in stacked]
    return rows, Source(leaf, tuple(rows))


def map_clients(function: Callable[..., Any], *placed: Placed) -> Placed:
    """Call a function at every client.

    Args:
        function: Called with one client's values; nothing it does may reach another client.
        placed: Values at the clients.

    Returns:
        What the function returned, at the clients.

    Raises:
        TypeError: If an argument is at the server, naming the remedy.
        ValueError: If the arguments are at different clients, or there is none.
    """
    if not placed:
        raise ValueError("`map_clients` needs at least one value at the clients, which says who they are.")
    for argument in placed:
        if not isinstance(argument, Placed):
            raise TypeError(
                f"`map_clients` works on values at the clients, got {type(argument).__name__}. Send it to them with"
                " `broadcast(value, clients)`, or place what they hold with `place(values, clients)`."
            )
        if argument.clients is not placed[0].clients:
            raise ValueError("All arguments of `map_clients` must be at the same `Clients` object.")
    trace = TRACE.get()
    results = []
    for position in range(1 if trace is not None else len(placed[0].values)):
        arguments_here = [argument.values[position] for argument in placed]
        if trace is None:
            results.append(function(*arguments_here))
            continue
        with trace.client_tape():
            results.append(function(*arguments_here))
    return Placed(tuple(results), placed[0].clients, merged_sources(argument.sources for argument in placed))


def sum(placed: Placed) -> Any:
    """Sum a value over the clients.

    Args:
        placed: Tensors or numbers of equal shape at every client, or containers of these.

    Returns:
        Their sum, at the server.

    Raises:
        TypeError: If the value is at the server already, or is no number.
    """
    if not isinstance(placed, Placed):
        raise TypeError(f"`sum` adds a value at the clients, got {type(placed).__name__}, which is at the server.")
    flattened = [pytree.tree_flatten(value) for value in placed.values]
    structure = flattened[0][1]
    totals = []
    for leaves in zip(*(leaves for leaves, _ in flattened), strict=True):
        totals.append(_total([_as_tensor(leaf) for leaf in leaves], placed))
    return pytree.tree_unflatten(totals, structure)


def _as_tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
        return torch.tensor(leaf, dtype=torch.get_default_dtype())
    raise TypeError(f"What clients send must be tensors or numbers, got {type(leaf).__name__}.")


def _total(leaves: list[Tensor], placed: Placed) -> Tensor:
    trace = TRACE.get()
    if trace is not None:
        return observe_sum(leaves[0], placed.sources, placed.clients, trace)
    if MIXED.get():
        return linearized_sum(leaves, placed.sources, placed.clients)
    total: Tensor = Sum.apply(torch.stack(leaves), placed.clients)
    return total


def mean(placed: Placed, weights: Placed | Sequence[float] | None = None) -> Any:
    """Average a value over the clients, by two sums.

    Args:
        placed: As for :func:`sum`.
        weights: The clients' weights: a number at each client, or ``K`` numbers in the clients' order that server and
            clients know. Equal by default.

    Returns:
        ``sum_k weight_k value_k / sum_k weight_k``, at the server.

    Raises:
        ValueError: If there are not as many weights as clients.
    """
    if not isinstance(placed, Placed):
        raise TypeError(f"`mean` averages a value at the clients, got {type(placed).__name__}, which is at the server.")
    if weights is None:
        return _scaled(sum(placed), 1 / len(placed.clients))
    if isinstance(weights, Placed):
        total = sum(weights)
        weighted = sum(map_clients(_scaled, placed, weights))
        return pytree.tree_map(lambda leaf: leaf / total, weighted)
    known = place([float(weight) for weight in weights], placed.clients)
    weighted = sum(map_clients(_scaled, placed, known))
    return _scaled(weighted, 1 / math.fsum(float(weight) for weight in weights))


def _scaled(value: Any, factor: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf * factor, value)


def weighted_sum(placed: Placed, weights: Tensor) -> Any:
    """Mix the clients' values by weights that the server chooses.

    The server applies the weights, so it reads every client's message: sums alone do not suffice, and secure
    aggregation cannot be used. Clients are sent nothing for it.

    Args:
        placed: As for :func:`sum`.
        weights: ``[K]``, at the server, in the clients' order; differentiable.

    Returns:
        ``sum_k weights[k] value_k``, at the server.

    Raises:
        ValueError: If the weights have another shape.
    """
    clients = placed.clients
    if weights.shape != (len(clients),):
        raise ValueError(f"`weights` must have the shape [{len(clients)}], got {list(weights.shape)}.")
    trace = TRACE.get()
    if trace is not None:
        trace.sums_only = False
    with clients.unaccounted():
        at_clients = broadcast(weights, clients)
    slots = Placed(tuple(clients.slots_here), clients)

    def weigh(value: Any, every_weight: Tensor, slot: int) -> Any:
        return _scaled(value, every_weight[slot])

    return sum(map_clients(weigh, placed, at_clients, slots))


def gradient(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Differentiate a client's loss, such that the result can be differentiated again in every mode.

    A local training step needs a gradient, and a derivative of that step needs the gradient's. With
    ``torch.autograd.grad`` and without ``create_graph`` the reverse and mixed modes would lose it silently.

    Args:
        loss: A scalar function of the inputs.
        inputs: Where to differentiate.

    Returns:
        One gradient per input.
    """
    tracked = [value if value.requires_grad else value.view_as(value).requires_grad_() for value in inputs]
    with torch.enable_grad():
        result = loss(*tracked)
    # Where nothing outside asks for a derivative by a tape, none is kept, and memory does not grow with the steps.
    is_on_tape = any(value.requires_grad for value in inputs) or depends_on_others(result, tracked)
    return torch.autograd.grad(result, tracked, create_graph=is_on_tape)


def depends_on_others(result: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Return whether a result depends on leaves of a tape besides the inputs."""
    accumulators = {id(tensor) for tensor in inputs}
    seen: set[Any] = set()
    waiting = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in accumulators:
            return True
        waiting += [parent for parent, _ in node.next_functions]
    return False


@contextmanager
def mixed_mode() -> Iterator[None]:
    """Let clients differentiate what they send."""
    token = MIXED.set(True)
    try:
        yield
    finally:
        MIXED.reset(token)


@contextmanager
def tracing(trace: Trace) -> Iterator[None]:
    """Account for a program without computing it."""
    token = TRACE.set(trace)
    try:
        with mixed_mode():
            yield
    finally:
        TRACE.reset(token)

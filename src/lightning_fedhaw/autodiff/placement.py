"""Values at the clients, and the operations of federated programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from lightning_fedhaw.autodiff import tape
from lightning_fedhaw.autodiff.linearized import Linearized, Source, linearized_sum, merged_sources, observe_sum
from lightning_fedhaw.autodiff.primitives import ACCOUNT, Broadcast, Clients, Sum
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
        TypeError: If the value is at the clients already, or cannot be sent.
    """
    _admit(clients)
    leaves, structure = pytree.tree_flatten(value)
    rows: list[Sequence[Any]] = []
    sources: list[Source] = []
    for leaf in leaves:
        if isinstance(leaf, Placed):
            _refuse_placed("is broadcast")
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, (int, float, complex, str, torch.dtype, torch.device, type(None))):
                raise TypeError(
                    f"`broadcast` sends tensors, numbers, and containers of these, got {type(leaf).__name__}. Of a"
                    " module, send `dict(module.named_parameters())`, and call it by `torch.func.functional_call`."
                )
            rows.append([leaf] * len(clients.slots_here))
            continue
        received, source = _received(leaf, clients)
        rows.append(received)
        if source is not None:
            sources.append(source)
    values = []
    for leaves_of_client in zip(*rows, strict=True):
        values.append(pytree.tree_unflatten(list(leaves_of_client), structure))
    return Placed(tuple(values), clients, tuple(sources))


def _admit(clients: Clients) -> None:
    account = ACCOUNT.get()
    if account is not None:
        account.admit(clients)


def _received(leaf: Tensor, clients: Clients) -> tuple[Sequence[Tensor], Source | None]:
    """What every client receives of one tensor and, in mixed mode, where its own tape begins."""
    trace = TRACE.get()
    # In mixed mode no tape leads from a client to the server: the client's own begins with what it received.
    is_cut = MIXED.get() and leaf.requires_grad
    stacked = Broadcast.apply(leaf.detach() if is_cut else leaf, clients)
    rows: Sequence[Tensor] = stacked.unbind(0)
    if is_cut:
        rows = [row.detach().requires_grad_() for row in rows]
    if trace is not None:
        trace.add_broadcast(leaf, rows[0])
    if not is_cut:
        return rows, None
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
        RuntimeError: If the function takes a gradient that would lose its derivative, or fails on another process.
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
    clients = placed[0].clients
    _admit(clients)
    sources = merged_sources(argument.sources for argument in placed)
    rows: set[int] = set()
    for source in sources:
        rows.update(map(id, source.rows))
    count = len(placed[0].values)
    if TRACE.get() is not None:
        # A trace takes all clients for alike, and follows the first.
        count = 1
    results = []
    with clients.failing_together():
        for position in range(count):
            values = [argument.values[position] for argument in placed]
            results.append(_guarded_call(function, values, rows))
    trace = TRACE.get()
    if trace is not None:
        trace.add_tape(tensors_in(results))
    return Placed(tuple(results), clients, sources)


def constant(leaf: Any) -> Any:
    """Return a value without its derivative, at the server or at the clients."""
    if isinstance(leaf, Placed):
        return Placed(tuple(pytree.tree_map(constant, value) for value in leaf.values), leaf.clients)
    return _primal(leaf).detach() if isinstance(leaf, Tensor) else leaf


def tensors_in(value: Any) -> list[Tensor]:
    """Collect the tensors in a container."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _guarded_call(function: Callable[..., Any], values: Sequence[Any], sources: Collection[int]) -> Any:
    """Call a function at a client, and let it forget no derivative.

    Args:
        function: The function.
        values: What the client holds.
        sources: In mixed mode, the ``id`` of the tensors at which the client's own tape begins.
    """
    received = []
    for tensor in tensors_in(values):
        # Other leaves of a tape are what a client holds: nobody differentiates these.
        if tensor.requires_grad and (tensor.grad_fn is not None or id(tensor) in sources):
            received.append(tensor)
    if not received:
        return function(*values)
    with tape.DerivativeGuard(received):
        return function(*values)


def sum(placed: Placed) -> Any:
    """Sum a value over the clients.

    Args:
        placed: Tensors or numbers of equal shape at every client, or containers of these.

    Returns:
        Their sum, at the server.

    Raises:
        TypeError: If the value is at the server already, or is no number.
        ValueError: If clients send values of different forms.
        RuntimeError: If what a client sends depends on a differentiated value that was never broadcast.
    """
    if not isinstance(placed, Placed):
        raise TypeError(f"`sum` adds a value at the clients, got {type(placed).__name__}, which is at the server.")
    _admit(placed.clients)
    totals = []
    with placed.clients.failing_together():
        messages, structure = _messages(placed)
        for position in range(len(messages[0])):
            totals.append(_total([message[position] for message in messages], placed))
    return pytree.tree_unflatten(totals, structure)


def _messages(placed: Placed) -> tuple[list[list[Tensor]], Any]:
    """The tensors that each client of this process sends, and their common form."""
    messages = []
    forms = []
    for value in placed.values:
        leaves, structure = pytree.tree_flatten(value)
        tensors = [_as_tensor(leaf) for leaf in leaves]
        _refuse_captured(tensors)
        messages.append(tensors)
        forms.append((structure, [(list(tensor.shape), tensor.dtype) for tensor in tensors]))
    ids = placed.clients.ids_here[: len(forms)]  # a trace has one client only
    for client, form in zip(ids, forms, strict=True):
        if form != forms[0]:
            raise ValueError(
                "Clients must send the same containers with tensors of the same shapes and dtypes. Client"
                f" {ids[0]} sends {forms[0][1]}, and client {client} sends {form[1]}."
            )
    return messages, forms[0][0]


def _refuse_captured(message: Sequence[Tensor]) -> None:
    """Refuse a message that depends on a server value that did not get to the client by a broadcast."""
    account = ACCOUNT.get()
    if account is None or not account.inputs:
        return
    inputs = {id(value) for value in account.inputs}
    for node in tape.nodes(message, lambda node: isinstance(node, Broadcast._backward_cls)):
        at_server = isinstance(node, (Sum._backward_cls, Linearized._backward_cls))
        if at_server or id(getattr(node, "variable", None)) in inputs:
            raise RuntimeError(
                "What a client sends depends on a differentiated server value that was never sent to it: a client's"
                " function captures it, or it was placed. Send it with `broadcast(value, clients)` and pass it to"
                " `map_clients`."
            )


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
        TypeError: If the value is at the server already, or the weights are being differentiated at the server.
        ValueError: If there are not as many weights as clients, or they add up to 0.
    """
    if not isinstance(placed, Placed):
        raise TypeError(f"`mean` averages a value at the clients, got {type(placed).__name__}, which is at the server.")
    if weights is None:
        return _scaled(sum(placed), 1 / len(placed.clients))
    if isinstance(weights, Placed):
        total = sum(weights)
        weighted = sum(map_clients(_scaled, placed, weights))
        return pytree.tree_map(lambda leaf: leaf / total, weighted)
    known = _known_weights(weights, len(placed.clients))
    weighted = sum(map_clients(_scaled, placed, place(known, placed.clients)))
    return _scaled(weighted, 1 / math.fsum(known))


def _known_weights(weights: Sequence[float], count: int) -> list[float]:
    if any(is_differentiated(leaf) for leaf in tensors_in([weights])):
        raise TypeError(
            "`weights` of `mean` are numbers that are not differentiated. Where the server chooses them, mix by"
            " `weighted_sum(placed, weights / weights.sum())`; where clients form them, compute them by `map_clients`."
        )
    if len(weights) != count:
        raise ValueError(f"`weights` must have one entry for each of the {count} clients, got {len(weights)}.")
    known = [float(weight) for weight in weights]
    if math.fsum(known) == 0:
        raise ValueError(f"`weights` must not add up to 0, got {known[:10]}.")
    return known


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a derivative is being taken through a tensor, by a tape or by a tangent."""
    return tensor.requires_grad or forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


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
    if not isinstance(placed, Placed):
        raise TypeError(f"`weighted_sum` mixes a value at the clients, got {type(placed).__name__}.")
    clients = placed.clients
    if not isinstance(weights, Tensor) or weights.shape != (len(clients),):
        shape = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"`weights` must have the shape [{len(clients)}], got {shape}.")
    trace = TRACE.get()
    if trace is not None:
        trace.sums_only = False
    known = constant(weights)
    total = sum(map_clients(_scaled, placed, place(known.unbind(0), clients)))
    if not is_differentiated(weights):
        return total
    # The server has the messages, and forms the derivative in the weights by itself: by a term that is zero.
    change = weights - known
    if trace is not None:
        return pytree.tree_map(lambda leaf: leaf + change.sum(), total)
    return pytree.tree_map(torch.add, total, _weighted_at_server(placed, change))


def _weighted_at_server(placed: Placed, weights: Tensor) -> Any:
    """Mix messages that the server has, so that nothing is sent in either direction."""
    clients = placed.clients
    messages, structure = _messages(placed)
    mixed = []
    with clients.unaccounted():
        shares = Broadcast.apply(weights, clients)[range(len(clients.slots_here)), clients.slots_here]
        for leaves in zip(*messages, strict=True):
            rows = torch.stack(leaves)
            if MIXED.get():
                # The clients' own tapes end at their messages.
                rows = rows.detach()
            factors = shares.reshape(-1, *[1] * (rows.ndim - 1))
            mixed.append(Sum.apply(rows * factors, clients))
    return pytree.tree_unflatten(mixed, structure)


def _primal(value: Tensor) -> Tensor:
    primal: Tensor = forward_ad.unpack_dual(value).primal  # type: ignore[no-untyped-call]
    return primal


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
    tracked = []
    for value in inputs:
        if not value.requires_grad:
            # A view, so that the caller's tensor does not require gradients afterwards.
            value = value.view_as(value).requires_grad_()
        tracked.append(value)
    with torch.enable_grad():
        result = loss(*tracked)
    # Where nothing outside asks for a derivative by a tape, none is kept, and memory does not grow with the steps.
    is_on_tape = any(value.requires_grad for value in inputs) or bool(
        tape.leaves([result]).keys() - {id(value) for value in tracked}
    )
    return torch.autograd.grad(result, tracked, create_graph=is_on_tape)


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

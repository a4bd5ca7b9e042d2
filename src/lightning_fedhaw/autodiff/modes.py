"""Derivatives of federated programs: forward, reverse and mixed mode, and what each of them costs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from lightning_fedhaw import arguments
from lightning_fedhaw.autodiff import tape
from lightning_fedhaw.autodiff.duals import dual_of, load_rules, parts_of
from lightning_fedhaw.autodiff.placement import Placed, constant, is_differentiated, mixed_mode, tensors_in, tracing
from lightning_fedhaw.autodiff.primitives import ACCOUNT, Account, DropOuts, Traffic
from lightning_fedhaw.autodiff.trace import Message, Trace

Mode = Literal["forward", "reverse", "mixed", "auto"]
Program = Callable[..., Any]


class Derivative(NamedTuple):
    """A program's value, its derivative, and what was sent for both.

    Attributes:
        value: What the program returned.
        gradient: The derivative, in the form of the argument that it is taken in. Of a program whose output has the
            shape ``[o...]``, each leaf ``[a...]`` of the argument has ``[o..., a...]``.
        traffic: Numbers sent to and by each client.
        mode: The mode that was used.
        aux: What else the program returned, with ``has_aux``.
    """

    value: Tensor
    gradient: Any
    traffic: Traffic
    mode: str
    aux: Any = None


@dataclass(frozen=True)
class ModeCost:
    """What a derivative costs besides the program itself, in numbers per client.

    Attributes:
        down: Numbers that each client receives.
        up: Numbers that each client sends.
        rounds: Communication rounds besides the program's.
        asks_again: Whether the same clients are asked twice.
        client_memory: Numbers that a client keeps; ``None`` stands for twice a step's, whatever the number of steps.
        server_memory: Numbers that the server keeps.
    """

    down: int
    up: int
    rounds: int
    asks_again: bool
    client_memory: int | None
    server_memory: int


@dataclass(frozen=True)
class CostSheet:
    """What a federated program and its derivative cost.

    Attributes:
        down: Numbers that each client receives in the program itself.
        up: Numbers that each client sends in the program itself.
        rounds: The program's communication rounds.
        sums_only: Whether the server reads nothing but sums over clients.
        modes: The cost of each mode.

    ``str()`` gives a table.
    """

    down: int
    up: int
    rounds: int
    sums_only: bool
    modes: Mapping[str, ModeCost]

    def cheapest(self, *, reaskable: bool = True) -> str:
        """Choose the mode with the fewest numbers sent; of equal ones the one that asks nobody again.

        Args:
            reaskable: Whether the clients of the program can be asked again.
        """
        allowed = {}
        for name, cost in self.modes.items():
            if reaskable or not cost.asks_again:
                allowed[name] = cost
        # Where nothing is sent, reverse mode computes the program once, and forward mode once per number.
        return min(
            allowed,
            key=lambda name: (allowed[name].down + allowed[name].up, allowed[name].asks_again, name != "reverse"),
        )

    def __str__(self) -> str:
        head = f"program: {self.down} down, {self.up} up per client, {self.rounds} rounds"
        lines = [head + ("" if self.sums_only else "; the server reads single messages")]
        lines.append("mode      down       up  rounds  asks again  client memory  server memory")
        for name, cost in self.modes.items():
            memory = "2x a step" if cost.client_memory is None else str(cost.client_memory)
            asks = "yes" if cost.asks_again else "no"
            lines.append(
                f"{name:<8}{cost.down:>6}{cost.up:>9}{cost.rounds:>8}{asks:>12}{memory:>15}{cost.server_memory:>15}"
            )
        return "\n".join(lines)


class _Call:
    """A program with its arguments, of which some leaves are differentiated.

    Args:
        program: The program.
        wrt: The name of its argument, or several.
        positional: The positional arguments.
        named: The keyword arguments.
        has_aux: Whether the program returns something besides its result.

    Raises:
        TypeError: If ``wrt`` is no argument, or holds something that has no derivative.
    """

    def __init__(
        self,
        program: Program,
        wrt: str | Sequence[str],
        positional: Sequence[Any],
        named: Mapping[str, Any],
        has_aux: bool,
    ) -> None:
        bound = inspect.signature(program).bind(*positional, **named)
        bound.apply_defaults()
        self.program = program
        self.bound = bound
        self.has_aux = has_aux
        self.aux: Any = None
        self.is_single = isinstance(wrt, str)
        self.names = [wrt] if isinstance(wrt, str) else list(wrt)
        if len(set(self.names)) < len(self.names):
            raise TypeError(f"`wrt` must name each argument once, got {self.names}.")
        for name in self.names:
            if name not in bound.arguments:
                known = ", ".join(f"`{argument}`" for argument in bound.arguments)
                raise TypeError(f"`wrt` must name arguments of the program ({known}), got {name!r}.")
        values = [bound.arguments[name] for name in self.names]
        self.leaves, self.structure = pytree.tree_flatten(values)
        self._check_leaves()
        self._refuse_nested()

    def _check_leaves(self) -> None:
        if not self.leaves:
            raise TypeError(f"`wrt`={self.names} holds nothing that could be differentiated.")
        for leaf in self.leaves:
            if isinstance(leaf, Placed):
                raise TypeError(
                    f"`wrt`={self.names} holds a value at the clients. Only server values are differentiated: broadcast"
                    " them within the program."
                )
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"`wrt`={self.names} must hold floating-point tensors, got {kind}. Integers have no derivative;"
                    " give a number as `torch.tensor(value)`."
                )
            if leaf.numel() == 0:
                raise TypeError(f"`wrt`={self.names} holds a tensor without entries, of shape {list(leaf.shape)}.")

    def _refuse_nested(self) -> None:
        """Refuse a derivative of a derivative, of which ``value_and_grad`` returns numbers only."""
        if ACCOUNT.get() is None:
            return
        if any(is_differentiated(leaf) for leaf in tensors_in(list(self.bound.arguments.values()))):
            raise TypeError(
                "`value_and_grad`, `jacobian` and `cost` cannot be differentiated, and are called within a program that"
                " is. For second derivatives call the program itself, and `torch.autograd.grad(..., create_graph=True)`"
                " at the server."
            )

    @property
    def size(self) -> int:
        """How many numbers the derivative is taken in."""
        return sum(leaf.numel() for leaf in self.leaves)

    def run(self, leaves: Sequence[Tensor]) -> Tensor:
        """Run the program with other values in place of the differentiated ones.

        Raises:
            TypeError: If the result is not one tensor at the server.
        """
        for name, value in zip(self.names, pytree.tree_unflatten(list(leaves), self.structure), strict=True):
            self.bound.arguments[name] = value
        result = self.program(*self.bound.args, **self.bound.kwargs)
        if self.has_aux:
            if not isinstance(result, tuple) or len(result) != 2:
                raise TypeError(f"With `has_aux=True` the program must return `(result, aux)`, got {result!r:.100}.")
            self.aux = pytree.tree_map(constant, result[1])
            result = result[0]
        if not isinstance(result, Tensor):
            at = "a value at the clients" if isinstance(result, Placed) else type(result).__name__
            raise TypeError(f"The program must return a tensor at the server, got {at}. Reduce it by `sum` or `mean`.")
        return result

    def rebuilt(self, gradients: Sequence[Tensor]) -> Any:
        """Return gradients in the form of the arguments."""
        values = pytree.tree_unflatten(list(gradients), self.structure)
        return values[0] if self.is_single else dict(zip(self.names, values, strict=True))

    def refuse_unused(self, is_used: Sequence[bool]) -> None:
        """Refuse a program whose result does not depend on what is differentiated.

        Args:
            is_used: Of each leaf, whether the result depends on it.

        Raises:
            ValueError: If an argument has no leaf that is used. Of its leaves, some may be unused: a rate that this
                call of the program does not need has the derivative 0.
        """
        values = pytree.tree_unflatten(list(is_used), self.structure)
        for name, used in zip(self.names, values, strict=True):
            if not any(pytree.tree_leaves(used)):
                raise ValueError(
                    f"The program's result does not depend on `wrt`={name!r}. Name another argument, and look for a"
                    " `.detach()`, a `.item()` or a constant on the way."
                )


def value_and_grad(
    program: Program,
    wrt: str | Sequence[str],
    mode: Mode = "auto",
    *,
    reaskable: bool = True,
    drop_outs: DropOuts | None = None,
    has_aux: bool = False,
) -> Callable[..., Derivative]:
    """Make a function that computes a federated program and its gradient.

    Args:
        program: A function of server values and values at clients that returns a scalar at the server, in any number
            of rounds, with branches and loops as in ordinary Python.
        wrt: The name of the argument to differentiate in, or several; server values.
        mode: ``"forward"``: derivatives travel with values, one pass per number. ``"reverse"``: a second pass asks the
            clients again. ``"mixed"``: clients send Jacobians, and nobody is asked again. ``"auto"``: the one that
            sends the fewest numbers, found by :func:`cost` once for arguments of one form (shapes, and Python values).
        reaskable: Whether ``"auto"`` may ask clients again.
        drop_outs: Clients that are gone in the reverse pass.
        has_aux: Whether the program returns ``(result, aux)``. What is in ``aux``, such as the new model or what
            clients keep, is returned as it is and not differentiated.

    Returns:
        A function of the program's arguments.

    Raises:
        ValueError: If the output is no scalar, does not depend on ``wrt``, or a name is unknown.
        TypeError: If ``wrt`` is no argument of the program or holds anything but floating-point tensors.

    Example:
        >>> from lightning_fedhaw import autodiff as ad
        >>> clients = ad.Clients(range(2))
        >>> def loss(rate, target):
        ...     at_clients = ad.broadcast(rate, clients)
        ...     return ad.mean(ad.map_clients(lambda r, t: (r - t) ** 2, at_clients, target))
        >>> derivative = ad.value_and_grad(loss, wrt="rate")(torch.tensor(1.0), ad.place([0.0, 2.0], clients))
        >>> float(derivative.value), float(derivative.gradient), derivative.traffic.rounds
        (1.0, 0.0, 1)
    """
    differentiate = jacobian(program, wrt, mode, reaskable=reaskable, drop_outs=drop_outs, has_aux=has_aux)

    def call(*positional: Any, **named: Any) -> Derivative:
        derivative = differentiate(*positional, **named)
        if derivative.value.numel() != 1:
            raise ValueError(
                f"The program must return a scalar, got the shape {list(derivative.value.shape)}. Reduce it, or take"
                " `jacobian`."
            )
        return derivative

    return call


def jacobian(
    program: Program,
    wrt: str | Sequence[str],
    mode: Mode = "auto",
    *,
    reaskable: bool = True,
    drop_outs: DropOuts | None = None,
    has_aux: bool = False,
) -> Callable[..., Derivative]:
    """Make a function that computes a federated program and its derivative, whatever the shape of its output.

    Args:
        program: As for :func:`value_and_grad`, with any server tensor as its output.
        wrt: As there.
        mode: As there.
        reaskable: As there.
        drop_outs: As there.
        has_aux: As there.
    """
    arguments.choice("mode", mode, Mode)
    decided: dict[str, str] = {}

    def call(*positional: Any, **named: Any) -> Derivative:
        chosen: str = mode
        if chosen == "auto":
            form = _form_of((positional, named))
            # An account takes longer than many a derivative.
            if form not in decided:
                sheet = cost(program, wrt, has_aux=has_aux)(*positional, **named)
                decided[form] = sheet.cheapest(reaskable=reaskable)
            chosen = decided[form]
        bound = _Call(program, wrt, positional, named, has_aux)
        account = Account(Traffic(), drop_outs)
        with account.opened(), _failing_together(account), _differentiable():
            value, gradients = _MODES[chosen](bound, account)
        return Derivative(value, bound.rebuilt(gradients), account.traffic, chosen, bound.aux)

    return call


def cost(program: Program, wrt: str | Sequence[str], *, has_aux: bool = False) -> Callable[..., CostSheet]:
    """Make a function that accounts for a federated program without computing it or asking a client.

    The program runs once on tensors without values, for one client. Branches may depend on Python values, and not on
    the values of tensors.

    Args:
        program: As for :func:`value_and_grad`.
        wrt: As there.
        has_aux: As there.

    Raises:
        ValueError: If a branch or a shape depends on the value of a tensor.
    """

    def call(*positional: Any, **named: Any) -> CostSheet:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        convert = _converter(fake)
        fake_positional = [convert(value) for value in positional]
        fake_named = {name: convert(value) for name, value in named.items()}
        bound = _Call(program, wrt, fake_positional, fake_named, has_aux)
        trace = Trace()
        try:
            with _differentiable(), fake, tracing(trace):
                leaves = [leaf.detach().requires_grad_() for leaf in bound.leaves]
                account = Account(Traffic(), inputs=leaves)
                with account.opened():
                    result = bound.run(leaves)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                "The cost of a program that branches on the value of a tensor, or has shapes that depend on it, cannot"
                ' be known before it is computed. Branch on Python values, or give the `mode` instead of `mode="auto"`.'
            ) from error
        return _sheet(trace, account.traffic, bound.size, result)

    return call


def _form_of(value: Any) -> str:
    """Describe arguments by what an account depends on: shapes and dtypes of tensors, and other values."""
    leaves, structure = pytree.tree_flatten(value)
    forms = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            forms.append(f"{leaf.dtype}{list(leaf.shape)}")
        elif isinstance(leaf, Placed):
            forms.append(f"{len(leaf)} of {_form_of(leaf.values[0])}")
        else:
            forms.append(f"{leaf!r}")
    return f"{structure} {forms}"


def _converter(fake: FakeTensorMode) -> Callable[[Any], Any]:
    def convert_leaf(value: Any) -> Any:
        if isinstance(value, Placed):
            return Placed(tuple(pytree.tree_map(convert_leaf, each) for each in value.values), value.clients)
        return fake.from_tensor(value) if isinstance(value, Tensor) else value

    return lambda value: pytree.tree_map(convert_leaf, value)


def _sheet(trace: Trace, traffic: Traffic, inputs: int, result: Tensor) -> CostSheet:
    """Add up what each mode sends, by the messages of a program.

    Args:
        trace: The messages.
        traffic: The program's own.
        inputs: Numbers that the derivative is taken in, n.
        result: What the program returns.
    """
    broadcasts: list[Message] = []
    sums: list[Message] = []
    for message in trace.messages:
        messages = sums if message.is_sum else broadcasts
        messages.append(message)
    # In mixed mode a client sends, with each message, its Jacobian in everything that the message depends on.
    jacobians = 0
    for message in sums:
        jacobians += message.numbers * sum(received.numbers for received in message.broadcasts)
    # Every tangent takes a pass of its own, in which the program's values travel again; the first pass is the program.
    repeated = inputs - 1
    forward = ModeCost(
        down=sum(message.numbers * message.inputs for message in broadcasts) + traffic.down * repeated,
        up=sum(message.numbers * message.inputs for message in sums) + traffic.up * repeated,
        rounds=traffic.rounds * repeated,
        asks_again=False,
        # A tangent needs no tape.
        client_memory=None,
        # A value and its tangent at a time.
        server_memory=2 * max((message.numbers for message in trace.messages), default=0),
    )
    in_reverse = trace.reverse_traffic(result, passes=result.numel())
    reverse = ModeCost(
        down=in_reverse.down - traffic.down,
        up=in_reverse.up - traffic.up,
        rounds=in_reverse.rounds - traffic.rounds,
        asks_again=in_reverse.rounds > traffic.rounds,
        client_memory=trace.client_memory,
        server_memory=sum(message.numbers for message in trace.messages),
    )
    memory = sum(trace.tape.values())
    mixed = ModeCost(down=0, up=jacobians, rounds=0, asks_again=False, client_memory=memory, server_memory=jacobians)
    modes = {"forward": forward, "reverse": reverse, "mixed": mixed}
    return CostSheet(traffic.down, traffic.up, traffic.rounds, trace.sums_only, modes)


@contextmanager
def _differentiable() -> Iterator[None]:
    """Keep tapes, whatever surrounds the call: Lightning calls hooks without them."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def _failing_together(account: Account) -> Iterator[None]:
    """End on every process, or on none."""
    try:
        yield
        for clients in account.clients[:1]:
            clients.agree("the end of the derivative")
    except BaseException as error:
        # Any error, an interrupt included: the other processes would wait for this one's sums forever.
        for clients in account.clients[:1]:
            clients.tell(error)
        raise


def _forward(call: _Call, account: Account) -> tuple[Tensor, list[Tensor]]:
    """Send one tangent after another along with the values."""
    load_rules()
    value: Tensor | None = None
    columns: list[list[Tensor]] = []
    is_used = [False] * len(call.leaves)
    for position, leaf in enumerate(call.leaves):
        columns.append([])
        for unit in torch.eye(leaf.numel(), dtype=leaf.dtype, device=leaf.device):
            with forward_ad.dual_level():
                # The other inputs have no tangent: each column is the derivative in one number.
                leaves = [other.detach() for other in call.leaves]
                leaves[position] = dual_of(leaves[position], unit.reshape(leaf.shape))
                primal, tangent = parts_of(call.run(leaves))
            value = primal.detach()
            if tangent is None:
                columns[position].append(torch.zeros_like(value))
            else:
                is_used[position] = True
                columns[position].append(tangent.detach())
    assert value is not None
    call.refuse_unused(is_used)
    gradients = []
    for leaf, tangents in zip(call.leaves, columns, strict=True):
        gradients.append(torch.stack(tangents, dim=-1).reshape(value.shape + leaf.shape).to(leaf.dtype))
    return value, gradients


def _reverse(call: _Call, account: Account) -> tuple[Tensor, list[Tensor]]:
    """Keep the tape, and ask the clients again for the derivative."""
    leaves = [leaf.detach().requires_grad_() for leaf in call.leaves]
    account.inputs = leaves
    result = call.run(leaves)
    # Not by the gradients, which are zeros as well where an input is used and has no effect.
    reached = tape.leaves([result])
    call.refuse_unused([id(leaf) in reached for leaf in leaves])
    rows: list[list[Tensor]] = [[] for _ in leaves]
    units = torch.eye(result.numel(), dtype=result.dtype, device=result.device)
    for unit in units:
        gradients = torch.autograd.grad(
            result, leaves, unit.reshape(result.shape), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for collected, gradient in zip(rows, gradients, strict=True):
            collected.append(gradient)
    shaped = []
    for leaf, collected in zip(leaves, rows, strict=True):
        shaped.append(torch.stack(collected).reshape(result.shape + leaf.shape))
    return result.detach(), shaped


def _mixed(call: _Call, account: Account) -> tuple[Tensor, list[Tensor]]:
    """Let clients send Jacobians, and pull back on the server alone."""
    with mixed_mode():
        return _reverse(call, account)


_MODES: Mapping[str, Callable[[_Call, Account], tuple[Tensor, list[Tensor]]]] = {
    "forward": _forward,
    "reverse": _reverse,
    "mixed": _mixed,
}

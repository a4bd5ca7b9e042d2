"""A user's optimizer on stacks of parameters: one step for many clients, each with its own state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.clients.engine import device_of_state
from lightning_fedhaw.clients.steps import is_plain_sgd
from lightning_fedhaw.streams import stream

OptimizerStates = dict[int, dict[str, Any]]
"""One client's states of one optimizer, by position of the parameter in the optimizer's groups."""

_ROW = object()
"""Stands for a state of the parameter's shape, which is a row of a stack."""

_Template = list[dict[str, Any]]
"""What one client's states look like: by parameter and name, a number, or ``_ROW``."""


class StackedOptimizer:
    """Step an element-wise optimizer on stacks, whose rows may have made different numbers of steps.

    States of a parameter's shape are stacked. Numbers, such as Adam's ``step``, are the same for rows that began with
    equal ones and have made equally many steps: each run of such rows is one step of the user's optimizer class.
    Which rows agree is known from where they began and what they did, so no step waits for numbers from a device.

    Args:
        optimizer: The user's optimizer; it is left alone.
        stacks: ``[rows, *shape]`` for each parameter of its groups, in their order; ``None`` for one that is frozen.
        row_states: Names of the states that have the parameter's shape, as :func:`row_states` finds them.
        states: What each row's client starts from, in host memory.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        stacks: Sequence[Tensor | None],
        row_states: frozenset[str],
        states: Sequence[OptimizerStates],
    ) -> None:
        self.optimizer = optimizer
        self.stacks = stacks
        self.row_states = row_states
        self.is_plain = is_plain_sgd(optimizer, [p for p in _parameters(optimizer) if p.requires_grad])
        self._is_fused = any(group.get("fused") for group in optimizer.param_groups)
        self._groups = [group for group in optimizer.param_groups for _ in group["params"]]
        self._rates: list[float] = []
        if self.is_plain:
            for group in optimizer.param_groups:
                # A rate may be a tensor on a device: it is read once for the group.
                self._rates += [float(group["lr"])] * len(group["params"])
        self._states: list[dict[str, Tensor]] = [{} for _ in stacks]
        self._templates: list[_Template] = []
        self._known: dict[Any, int] = {}
        self._next: dict[tuple[int, tuple[bool, ...]], int] = {}
        self._kind_of: dict[int, int] = {}
        self.kinds = [self._load(row, state) for row, state in enumerate(states)]

    def step(self, rows: Sequence[int], at: Any, gradients: Sequence[Tensor | None]) -> None:
        """Step the clients of a call.

        Args:
            rows: Their rows, in ascending order.
            at: The same as a slice, or as an index tensor.
            gradients: ``[len(rows), *shape]`` for each parameter of the groups; ``None`` for one that was not used.
        """
        if self.is_plain:
            for stack, gradient, rate in zip(self.stacks, gradients, self._rates, strict=True):
                if gradient is None or stack is None:
                    continue
                if isinstance(at, slice):
                    stack[at].add_(gradient, alpha=-rate)
                else:
                    stack.index_add_(0, at.to(stack.device), gradient, alpha=-rate)
            return
        for begin, end in self._runs(rows):
            self._step_run(rows[begin], rows[end - 1] + 1, [None if g is None else g[begin:end] for g in gradients])

    def states(self, row: int) -> OptimizerStates:
        """Copy a row's states into host memory, as the sequential engine keeps them."""
        return {
            index: {
                name: _in_host_memory(self._states[index][name][row] if value is _ROW else value)
                for name, value in states.items()
            }
            for index, states in enumerate(self._templates[self.kinds[row]])
            if states
        }

    def _runs(self, rows: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Find the runs of neighboring rows whose numbers agree, as positions in ``rows``."""
        kinds = self.kinds
        cuts = [i + 1 for i, (a, b) in enumerate(pairwise(rows)) if b != a + 1 or kinds[a] != kinds[b]]
        yield from pairwise([0, *cuts, len(rows)])

    def _step_run(self, begin: int, end: int, gradients: Sequence[Tensor | None]) -> None:
        """Step neighboring rows whose numbers agree, by one step of the user's class."""
        kind = self.kinds[begin]
        template = self._templates[kind]
        given: list[Tensor] = []
        before: list[dict[str, Any]] = []
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        for index, (stack, gradient) in enumerate(zip(self.stacks, gradients, strict=True)):
            parameter = torch.empty(0) if stack is None else stack[begin:end]
            # Fused kernels go through a gradient's memory as if it lay like its parameter.
            parameter.grad = gradient.contiguous() if self._is_fused and gradient is not None else gradient
            given.append(parameter)
            before.append(
                {
                    name: self._states[index][name][begin:end] if value is _ROW else _copied(value)
                    for name, value in template[index].items()
                }
            )
            if template[index]:
                state[parameter] = dict(before[index])
        rebind_optimizer(self.optimizer, given, state).step()
        after = [dict(state[p]) if p in state else {} for p in given]
        for index, own in enumerate(after):
            for name, value in own.items():
                # One that was changed in place is a part of the stack.
                if self._is_row(name, value) and value is not before[index].get(name):
                    self._put(index, name, slice(begin, end), value)
        used = tuple(gradient is not None for gradient in gradients)
        if (kind, used) not in self._next:
            self._next[kind, used] = self._add(self._template(after))
        self.kinds[begin:end] = [self._next[kind, used]] * (end - begin)

    def _is_row(self, name: str, value: Any) -> bool:
        return name in self.row_states and isinstance(value, Tensor)

    def _put(self, index: int, name: str, rows: slice, value: Tensor) -> None:
        """Write rows of a state into its stack, which is made with the first of them."""
        stack = self.stacks[index]
        assert stack is not None
        own = self._states[index].get(name)
        if own is None:
            shape = (len(stack), *value.shape[1:])
            own = self._states[index][name] = torch.empty(shape, dtype=value.dtype, device=stack.device)
        own[rows].copy_(value)

    def _template(self, states: Sequence[Mapping[str, Any]]) -> _Template:
        """Keep the numbers of some states, and a placeholder for each that is a row."""
        return [
            {name: _ROW if self._is_row(name, value) else _copied(value) for name, value in own.items()}
            for own in states
        ]

    def _add(self, template: _Template) -> int:
        """Number a template."""
        self._templates.append(template)
        return len(self._templates) - 1

    def _placed(self, template: _Template) -> _Template:
        """Move the numbers of a template, which are in host memory, to where the optimizer wants them."""
        for own, stack, group in zip(template, self.stacks, self._groups, strict=True):
            for name, value in own.items():
                if isinstance(value, Tensor) and stack is not None:
                    own[name] = value.to(device_of_state(name, stack.device, group))
        return template

    def _load(self, row: int, states: OptimizerStates) -> int:
        """Take what a row starts from, and return the number of its template."""
        # A frozen parameter is not stepped, whatever the constructor made for it.
        given = [{} if stack is None else states.get(i, {}) for i, stack in enumerate(self.stacks)]
        for index, own in enumerate(given):
            for name, value in own.items():
                if self._is_row(name, value):
                    self._put(index, name, slice(row, row + 1), value[None])
        # Clients without memory share one object, and are recognized without a look at it.
        if id(states) not in self._kind_of:
            template = self._template(given)
            key = _key(template)
            if key not in self._known:
                self._known[key] = self._add(self._placed(template))
            self._kind_of[id(states)] = self._known[key]
        return self._kind_of[id(states)]


def row_states(optimizer: torch.optim.Optimizer, initial: OptimizerStates) -> frozenset[str]:
    """Find out whether an optimizer is element-wise, by trying it on two small clients stacked and alone.

    Args:
        optimizer: The user's optimizer; it is left alone.
        initial: Its states before the first step.

    Returns:
        Names of the states that have the parameter's shape.

    Raises:
        ValueError: If it is not element-wise, saying what it did.
    """
    name = type(optimizer).__name__
    device = next(_parameters(optimizer)).device
    shapes = [(3, 4), (5,), (2, 3, 2, 2)]
    generator = stream(0, "element-wise")
    start, *gradients = (
        [torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]
        for _ in range(4)
    )
    if is_plain_sgd(optimizer, [p for p in _parameters(optimizer) if p.requires_grad]):
        return frozenset()

    def run(rows: slice | int) -> tuple[list[Tensor], list[dict[str, Any]]]:
        given: list[Tensor] = []
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        for group in optimizer.param_groups:
            for parameter in (s[rows].clone() for s in start):
                given.append(parameter)
                for n, v in next(iter(initial.values())).items() if initial else ():
                    state[parameter][n] = _spread(v, parameter, device_of_state(n, device, group))
        copy = rebind_optimizer(optimizer, given, state, each=len(shapes))
        before = repr(_options(copy))
        for step in gradients:
            for parameter, gradient in zip(given, step * len(optimizer.param_groups), strict=True):
                parameter.grad = gradient[rows].clone()
            copy.step()
        if repr(_options(copy)) != before:
            raise ValueError(f"`{name}` keeps state in its parameter groups")
        return given, [state[parameter] for parameter in given]

    try:
        together, states = run(slice(None))
        alone = [run(row) for row in (0, 1)]
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"`{name}` cannot be stepped on gradients alone ({error})") from error
    found = {n for own in alone[0][1] for n, v in own.items() if isinstance(v, Tensor) and v.ndim}
    for index, parameter in enumerate(together):
        for row, (parameters, own) in enumerate(alone):
            pairs: list[tuple[Any, Any]] = [(parameter[row], parameters[index])]
            for n in states[index]:
                whole, part = states[index][n], own[index].get(n)
                pairs.append((whole[row] if n in found else whole, part))
            if own[index].keys() != states[index].keys() or not all(map(_agree, pairs)):
                raise ValueError(f"`{name}` is not element-wise: a parameter's step depends on the others")
    return frozenset(found)


def rebind_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    state: defaultdict[Any, dict[str, Any]],
    each: int | None = None,
) -> torch.optim.Optimizer:
    """Make an optimizer of the same class and settings on other parameters, ``each`` a group.

    Its constructor is not called: it may take what nobody kept.
    """
    copy = object.__new__(type(optimizer))
    # A scheduler puts its own `step` on the object.
    copy.__dict__ = {name: value for name, value in vars(optimizer).items() if name != "step"}
    groups = []
    begin = 0
    for group in optimizer.param_groups:
        count = each or len(group["params"])
        groups.append({**group, "params": list(parameters[begin : begin + count])})
        begin += count
    copy.param_groups = groups
    copy.state = state
    return copy


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{n: v for n, v in group.items() if n != "params"} for group in optimizer.param_groups]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _in_host_memory(value: Any) -> Any:
    """Copy a value, and a tensor into host memory."""
    return value.to("cpu", copy=True) if isinstance(value, Tensor) else value


def _key(template: _Template) -> Any:
    """Return what tells templates of states in host memory apart; the numbers of all tensors are read in one go."""
    tensors = [value for own in template for value in own.values() if isinstance(value, Tensor)]
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.double() for tensor in tensors]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return tuple(
        tuple((name, next(numbers) if isinstance(value, Tensor) else value) for name, value in own.items())
        for own in template
    )


def _spread(value: Any, parameter: Tensor, device: torch.device) -> Any:
    """Make a constructor's state for another parameter; a number on the device where the optimizer wants it."""
    if not isinstance(value, Tensor):
        return value
    if not value.ndim:
        return value.to(device, copy=True)
    return torch.full_like(parameter, value.flatten()[0].item())


def _agree(pair: tuple[Any, Any]) -> bool:
    a, b = pair
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b) and isinstance(a, Tensor) == isinstance(b, Tensor)
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-12)

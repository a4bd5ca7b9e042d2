"""A user's optimizer on stacks of parameters: one step for many clients, each with its own state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fedhaw.clients.optimizer_states import OptimizerStates, ParameterState, device_of_state
from lightning_fedhaw.clients.plan import LocalPlan
from lightning_fedhaw.clients.rates import PROPORTIONAL
from lightning_fedhaw.clients.rebinding import rebind_optimizer
from lightning_fedhaw.clients.steps import is_plain_sgd, parameters_of, trainable_among
from lightning_fedhaw.streams import stream

RowIndex = slice | Tensor
"""Rows of a stack: a slice where they are neighbors, else an int64 index."""

StepObserver = Callable[[slice, Sequence[Tensor], defaultdict[Tensor, ParameterState]], None]
"""Is given rows, their parameters with gradients, and the optimizer's state of them."""

_ROW = object()
"""A placeholder for a state of the parameter's shape, which is a row of a stack."""

_Template = list[ParameterState]
"""The states of a client by parameter and name, with ``_ROW`` for each that is a row of a stack."""


class StackedOptimizer:
    """An element-wise optimizer that steps stacks, whose rows may have made different numbers of steps.

    States of a parameter's shape are stacked. Numbers, such as Adam's ``step``, are the same for rows that began with
    equal ones and have made equally many steps: each run of such rows is one step of the user's optimizer class.
    Which rows agree is known from their beginning and their steps, so that nothing has to be read from a device.

    Args:
        optimizer: The user's optimizer, which is not changed.
        stacks: ``[rows, *shape]`` for each parameter of its groups, in their order; ``None`` for one that is frozen.
        row_states: Names of the states that have the parameter's shape, as :func:`row_states` finds them.
        states: The states that each row's client starts from, in host memory.
        observer: Called before neighboring rows are stepped, with the rows, their parameters with gradients, and the
            optimizer's state.

    Attributes:
        kinds: For each row, the number of its template: rows of one kind agree in all numbers.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        stacks: Sequence[Tensor | None],
        row_states: frozenset[str],
        states: Sequence[OptimizerStates],
        observer: StepObserver | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.observer = observer
        self.stacks = stacks
        self.row_states = row_states
        self.is_plain = observer is None and is_plain_sgd(optimizer, trainable_among(parameters_of(optimizer)))
        self._is_fused = any(group.get("fused") for group in optimizer.param_groups)
        # By position of the parameter: the options of its group, and with plain SGD its learning rate.
        self._groups: list[Mapping[str, object]] = []
        self._rates: list[float] = []
        for group in optimizer.param_groups:
            self._groups += [group] * len(group["params"])
            if self.is_plain:
                # A rate may be a tensor on a device: it is read once for the group.
                self._rates += [float(group["lr"])] * len(group["params"])
        self._states: list[dict[str, Tensor]] = [{} for _ in stacks]
        self._templates: list[_Template] = []
        self._kind_of_template: dict[object, int] = {}
        self._next_kind: dict[tuple[int, tuple[bool, ...]], int] = {}
        self._kind_of_states: dict[int, int] = {}
        self.kinds = [self._load(row, state) for row, state in enumerate(states)]

    def step(self, rows: Sequence[int], row_index: RowIndex, gradients: Sequence[Tensor | None]) -> None:
        """Step the clients of a call.

        Args:
            rows: Their rows, in ascending order.
            row_index: The same as an index.
            gradients: ``[len(rows), *shape]`` for each parameter of the groups; ``None`` for one that was not used.
        """
        if self.is_plain:
            self._step_plain(row_index, gradients)
            return
        for begin, end in self._runs(rows):
            run_gradients: list[Tensor | None] = []
            for gradient in gradients:
                run_gradients.append(None if gradient is None else gradient[begin:end])
            self._step_run(rows[begin], rows[end - 1] + 1, run_gradients)

    def _step_plain(self, row_index: RowIndex, gradients: Sequence[Tensor | None]) -> None:
        """Step plain SGD, which has no state, without an optimizer object."""
        for stack, gradient, rate in zip(self.stacks, gradients, self._rates, strict=True):
            if gradient is None or stack is None:
                continue
            if isinstance(row_index, slice):
                stack[row_index].add_(gradient, alpha=-rate)
            else:
                stack.index_add_(0, row_index.to(stack.device), gradient, alpha=-rate)

    def states(self, row: int) -> OptimizerStates:
        """Copy a row's states into host memory, as the sequential engine keeps them."""
        states: OptimizerStates = {}
        for index, template in enumerate(self._templates[self.kinds[row]]):
            state = {}
            for name, value in template.items():
                if value is _ROW:
                    value = self._states[index][name][row]
                state[name] = value.to("cpu", copy=True) if isinstance(value, Tensor) else value
            if state:
                states[index] = state
        return states

    def _runs(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Find the runs of neighboring rows whose numbers agree, as positions in ``rows``."""
        begins = [0]
        for position, (row, following) in enumerate(pairwise(rows), start=1):
            if following != row + 1 or self.kinds[following] != self.kinds[row]:
                begins.append(position)
        return list(pairwise([*begins, len(rows)]))

    def _step_run(self, begin: int, end: int, gradients: Sequence[Tensor | None]) -> None:
        """Step neighboring rows whose numbers agree, by one step of the user's class.

        Args:
            begin: The first row.
            end: The row after the last.
            gradients: ``[end - begin, *shape]`` for each parameter; ``None`` for one that was not used.
        """
        kind = self.kinds[begin]
        parameters: list[Tensor] = []
        states_before: list[ParameterState] = []
        state: defaultdict[Tensor, ParameterState] = defaultdict(dict)
        for index, (stack, gradient) in enumerate(zip(self.stacks, gradients, strict=True)):
            # A frozen parameter keeps its place in the groups, and has no gradient.
            parameter = torch.empty(0) if stack is None else stack[begin:end]
            if gradient is not None and self._is_fused:
                # Fused kernels go through a gradient's memory as if it lay like its parameter.
                gradient = gradient.contiguous()
            parameter.grad = gradient
            parameters.append(parameter)
            state_before = self._state_of_run(index, kind, begin, end)
            states_before.append(state_before)
            if state_before:
                state[parameter] = dict(state_before)
        if self.observer is not None:
            self.observer(slice(begin, end), parameters, state)
        rebind_optimizer(self.optimizer, parameters, state).step()
        states_after = [dict(state.get(parameter, {})) for parameter in parameters]
        for index, state_after in enumerate(states_after):
            for name, value in state_after.items():
                # One that was changed in place is a part of the stack.
                if self._is_row(name, value) and value is not states_before[index].get(name):
                    self._put(index, name, slice(begin, end), value)
        # The numbers after the step depend on those before it and on the parameters that were used, and on nothing
        # else. So rows that took the same way are of one kind, and only the first of them makes a template.
        step = (kind, tuple(gradient is not None for gradient in gradients))
        if step not in self._next_kind:
            self._next_kind[step] = self._add(self._template(states_after))
        self.kinds[begin:end] = [self._next_kind[step]] * (end - begin)

    def _state_of_run(self, index: int, kind: int, begin: int, end: int) -> ParameterState:
        """Return the state of one parameter for neighboring rows of one kind: views of stacks, copies of numbers."""
        state: ParameterState = {}
        for name, value in self._templates[kind][index].items():
            if value is _ROW:
                state[name] = self._states[index][name][begin:end]
            else:
                state[name] = _copied(value)
        return state

    def _is_row(self, name: str, value: object) -> bool:
        return name in self.row_states and isinstance(value, Tensor)

    def _put(self, index: int, name: str, rows: slice, value: Tensor) -> None:
        """Write rows of a state into its stack, which is made with the first of them."""
        parameters = self.stacks[index]
        assert parameters is not None
        stack = self._states[index].get(name)
        if stack is None:
            shape = (len(parameters), *value.shape[1:])
            stack = torch.empty(shape, dtype=value.dtype, device=parameters.device)
            self._states[index][name] = stack
        stack[rows].copy_(value)

    def _template(self, states: Sequence[Mapping[str, object]]) -> _Template:
        """Copy the numbers of some states, with a placeholder for each state that is a row."""
        template: _Template = []
        for state in states:
            entry: ParameterState = {}
            for name, value in state.items():
                entry[name] = _ROW if self._is_row(name, value) else _copied(value)
            template.append(entry)
        return template

    def _add(self, template: _Template) -> int:
        """Add a template, and return its number."""
        self._templates.append(template)
        return len(self._templates) - 1

    def _placed(self, template: _Template) -> _Template:
        """Move the numbers of a template from host memory to where the optimizer reads them."""
        for state, stack, group in zip(template, self.stacks, self._groups, strict=True):
            for name, value in state.items():
                if isinstance(value, Tensor) and stack is not None:
                    state[name] = value.to(device_of_state(name, stack.device, group))
        return template

    def _load(self, row: int, states: OptimizerStates) -> int:
        """Load the states that a row starts from, and return the number of its template."""
        loaded: list[ParameterState] = []
        for index, stack in enumerate(self.stacks):
            # A frozen parameter is not stepped, even if the constructor made a state for it.
            loaded.append({} if stack is None else states.get(index, {}))
        for index, state in enumerate(loaded):
            for name, value in state.items():
                if self._is_row(name, value):
                    self._put(index, name, slice(row, row + 1), value[None])
        # Clients without a state of their own share one object, so that comparing identities saves reading it.
        if id(states) not in self._kind_of_states:
            template = self._template(loaded)
            key = _key(template)
            if key not in self._kind_of_template:
                self._kind_of_template[key] = self._add(self._placed(template))
            self._kind_of_states[id(states)] = self._kind_of_template[key]
        return self._kind_of_states[id(states)]


class _TrialResult(NamedTuple):
    """Parameters and their states after some steps."""

    parameters: list[Tensor]
    states: list[ParameterState]


class _Trial:
    """Steps of an optimizer on two small clients, stacked and alone.

    Args:
        optimizer: The user's optimizer, which is not changed.
        initial: Its states before the first step.
    """

    def __init__(self, optimizer: Optimizer, initial: OptimizerStates) -> None:
        self.optimizer = optimizer
        # Without a look at single parameters: an element-wise optimizer starts all of them alike.
        self.initial_state: ParameterState = {}
        if initial:
            self.initial_state = next(iter(initial.values()))
        self.device = next(parameters_of(optimizer)).device
        self._generator = stream(0, "element-wise")
        self.starts = self._draw()
        # Several steps, because some optimizers treat the first one specially.
        self.gradients = [self._draw() for _ in range(3)]

    def _draw(self) -> list[Tensor]:
        """Draw ``[2, *shape]`` for three parameters of different shapes, one of them a convolution's."""
        tensors = []
        for shape in ((3, 4), (5,), (2, 3, 2, 2)):
            tensors.append(torch.randn(2, *shape, generator=self._generator, dtype=torch.float64).to(self.device))
        return tensors

    def run(self, rows: slice | int) -> _TrialResult:
        """Step some clients, with the three parameters in each of the optimizer's groups.

        Args:
            rows: Both clients, or one of them.

        Raises:
            ValueError: If the optimizer changes its parameter groups.
        """
        parameters: list[Tensor] = []
        state: defaultdict[Tensor, ParameterState] = defaultdict(dict)
        for group in self.optimizer.param_groups:
            for start in self.starts:
                parameter = start[rows].clone()
                parameters.append(parameter)
                for name, value in self.initial_state.items():
                    device = device_of_state(name, self.device, group)
                    state[parameter][name] = _spread(value, parameter, device)
        copy = rebind_optimizer(self.optimizer, parameters, state, group_size=len(self.starts))
        options_before = repr(_options(copy))
        for gradients in self.gradients:
            gradients_of_groups = gradients * len(self.optimizer.param_groups)
            for parameter, gradient in zip(parameters, gradients_of_groups, strict=True):
                parameter.grad = gradient[rows].clone()
            copy.step()
        if repr(_options(copy)) != options_before:
            raise ValueError(f"`{type(self.optimizer).__name__}` keeps state in its parameter groups")
        return _TrialResult(parameters, [state[parameter] for parameter in parameters])


def row_states(optimizer: Optimizer, initial: OptimizerStates) -> frozenset[str]:
    """Find out whether an optimizer is element-wise, by trying it on two small clients stacked and alone.

    Args:
        optimizer: The user's optimizer, which is not changed.
        initial: Its states before the first step.

    Returns:
        Names of the states that have the parameter's shape.

    Raises:
        ValueError: If it is not element-wise, with the reason.
    """
    name = type(optimizer).__name__
    if is_plain_sgd(optimizer, trainable_among(parameters_of(optimizer))):
        return frozenset()
    try:
        trial = _Trial(optimizer, initial)
        together = trial.run(slice(None))
        alone = [trial.run(row) for row in (0, 1)]
    except ValueError:
        raise
    except Exception as error:
        # Optimizers of any library may be given, and may raise anything.
        raise ValueError(f"`{name}` cannot be stepped on gradients alone ({error})") from error
    names = set()
    for state in alone[0].states:
        for state_name, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                names.add(state_name)
    for row in (0, 1):
        if not _is_row_of(together, alone[row], row, names):
            raise ValueError(f"`{name}` is not element-wise: a parameter's step depends on the others")
    return frozenset(names)


def check_scalable(optimizer: Optimizer, plan: LocalPlan) -> None:
    """Refuse an optimizer whose step may not be proportional to its rate, where clients have rates of their own.

    Raises:
        ValueError: With the reason.
    """
    if plan.lr_scale is not None and type(optimizer) not in PROPORTIONAL:
        raise ValueError(
            f"`{type(optimizer).__name__}` may not make steps in proportion to its learning rate, which"
            " `client_lr_scale` scales"
        )


def _is_row_of(together: _TrialResult, alone: _TrialResult, row: int, row_names: set[str]) -> bool:
    """Return whether one client's results are a row of the results of both.

    Args:
        together: The results of both clients.
        alone: The results of one client.
        row: The client's row.
        row_names: Names of the states that have the parameter's shape.
    """
    for stack, parameter in zip(together.parameters, alone.parameters, strict=True):
        if not _agree(stack[row], parameter):
            return False
    for stacked_state, state in zip(together.states, alone.states, strict=True):
        if stacked_state.keys() != state.keys():
            return False
        for name, value in stacked_state.items():
            if name in row_names:
                value = value[row]
            if not _agree(value, state[name]):
                return False
    return True


def _options(optimizer: Optimizer) -> list[dict[str, object]]:
    """Return the options of an optimizer's groups, without the parameters."""
    options = []
    for group in optimizer.param_groups:
        options_of_group = dict(group)
        del options_of_group["params"]
        options.append(options_of_group)
    return options


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def _key(template: _Template) -> object:
    """Return a key that is equal for templates with equal numbers, in host memory."""
    tensors = []
    for state in template:
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    # All numbers in one go; one by one it takes many times as long.
    numbers: Iterator[object] = iter(())
    if tensors:
        if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
            tensors = [tensor.double() for tensor in tensors]
        numbers = iter(torch.stack(tensors).tolist())
    key = []
    for state in template:
        entries = []
        for name, value in state.items():
            entries.append((name, next(numbers) if isinstance(value, Tensor) else value))
        key.append(tuple(entries))
    return tuple(key)


def _spread(value: object, parameter: Tensor, device: torch.device) -> object:
    """Make a constructor's state for another parameter.

    Args:
        value: The state.
        parameter: The other parameter.
        device: The device of a state that is a number.
    """
    if not isinstance(value, Tensor):
        return value
    if not value.ndim:
        return value.to(device, copy=True)
    # Constructors fill states with one number, whatever the shape.
    return torch.full_like(parameter, value.flatten()[0].item())


def _agree(a: object, b: object) -> bool:
    """Return whether two values agree except for rounding."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-12)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return bool(a == b)

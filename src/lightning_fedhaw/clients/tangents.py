"""Derivatives of clients' models in the factor on their learning rates, carried through the local steps.

With ``w`` a client's parameters, ``o(w, g, s)`` the change that its optimizer makes with the gradient ``g`` and the
state ``s``, and ``b`` the factor, a step and its derivative in ``b`` are::

    w  <- w  + b o(w, g, s)
    w' <- w' + o(w, g, s) + b o'(w, g, s; w', g', s')        with g' the change of the gradient along w'

``w'`` and ``s'`` are zero when a round begins. So this is forward mode: a step needs the tangents of the step before
it, and memory does not grow with the number of steps. ``o'`` is computed by the user's own optimizer, on dual numbers.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_fedhaw.autodiff.duals import dual_of, load_rules, parts_of
from lightning_fedhaw.clients.optimizer_states import OptimizerStates, ParameterState
from lightning_fedhaw.clients.rebinding import rebind_optimizer
from lightning_fedhaw.clients.steps import parameters_of
from lightning_fedhaw.rule import LocalLRScale
from lightning_fedhaw.streams import stream

RATE_TANGENT = "rate tangent"
"""The name of a client's tangent ``[P]`` among what its update carries."""

Rows = slice | Tensor | EllipsisType
"""Rows of a stack of clients; ``...`` for a single client, whose tensors have no such axis."""

OptimizerState = defaultdict[Tensor, ParameterState]
"""The state of each parameter."""

KERNELS = ("foreach", "fused")
"""Options of implementations without forward derivatives, which are other ways to the same step."""


def _without_kernels(group: Mapping[str, object]) -> dict[str, bool]:
    """Return the options of a parameter group that switch these implementations off."""
    return {name: False for name in KERNELS if name in group}


class RateTangents:
    """The tangents of one client, or of a stack of clients.

    Args:
        optimizer: The user's optimizer, which is not changed.
        parameters: The parameters in the order of its groups, ``[..., *shape]``; ``None`` for a frozen one.

    Attributes:
        values: The tangents of the parameters; ``None`` for a frozen one.
        slopes: The changes of the last gradients along them.
        states: The tangents of the optimizer's states, by name, for each parameter.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor | None]) -> None:
        self.optimizer = optimizer
        self.values: list[Tensor | None] = []
        self.slopes: list[Tensor | None] = []
        for parameter in parameters:
            self.values.append(_zeros(parameter))
            self.slopes.append(_zeros(parameter))
        self.states: list[dict[str, Tensor]] = [{} for _ in parameters]

    @contextmanager
    def level(self) -> Iterator[None]:
        """Compute with dual numbers inside the context, by kernels that have second derivatives."""
        load_rules()
        with dual_level(), sdpa_kernel(SDPBackend.MATH):
            yield

    def dual(self, position: int, parameter: Tensor, rows: Rows = ...) -> Tensor:
        """Return a parameter of some rows as a dual number; only inside of :meth:`level`."""
        value = self.values[position]
        assert value is not None
        # A copy, because operations in place change a tangent, too.
        return dual_of(parameter, value[rows].clone())

    def put_slopes(self, gradients: Sequence[Tensor | None], rows: Rows = ...) -> None:
        """Keep the tangents of gradients that were computed with duals; only inside of :meth:`level`."""
        for slopes, gradient in zip(self.slopes, gradients, strict=True):
            if slopes is None or gradient is None:
                continue
            tangent = parts_of(gradient)[1]
            if tangent is None:
                slopes[rows] = 0.0
            else:
                slopes[rows] = tangent.detach()

    @torch.no_grad()
    def step(
        self,
        parameters: Sequence[Tensor],
        state: Mapping[Tensor, Mapping[str, Any]],
        factor: float,
        rows: Rows = ...,
        own_factors: Tensor | None = None,
    ) -> None:
        """Carry the tangents of some rows through a step.

        Args:
            parameters: The rows of the parameters before the step, in the order of the groups, with the gradients that
                the optimizer gets. Not changed.
            state: The optimizer's state of them before the step. Not changed.
            factor: The factor ``b`` on the step.
            rows: The rows.
            own_factors: ``[rows]``, constant factors on the clients' rates that the optimizer does not know.
        """
        duals: list[Tensor] = []
        dual_state: OptimizerState = defaultdict(dict)
        with self.level(), _SafeRoots():
            for position, parameter in enumerate(parameters):
                dual = self._dual_of_step(position, parameter, rows)
                duals.append(dual)
                if parameter in state:
                    dual_state[dual] = self._dual_state(position, state[parameter], parameter, rows)
            copy = rebind_optimizer(self.optimizer, duals, dual_state)
            for group in copy.param_groups:
                group.update(_without_kernels(group))
            # Hooks are called once a step, by the step itself.
            copy._optimizer_step_pre_hooks = OrderedDict()
            copy._optimizer_step_post_hooks = OrderedDict()
            copy.step()
            for position, (parameter, dual) in enumerate(zip(parameters, duals, strict=True)):
                if parameter.grad is not None:
                    self._advance(position, parameter, dual, factor, rows, own_factors)
                    self._put_state(position, dual_state[dual], parameter, rows)

    def _dual_of_step(self, position: int, parameter: Tensor, rows: Rows) -> Tensor:
        """Return a copy of a parameter as a dual, with its gradient; a plain one where it has none."""
        slopes = self.slopes[position]
        if slopes is None or parameter.grad is None:
            return torch.empty(0)
        dual = self.dual(position, parameter.detach().clone(), rows)
        dual.grad = dual_of(parameter.grad.detach().clone(), slopes[rows].clone())
        return dual

    def _dual_state(self, position: int, state: Mapping[str, Any], parameter: Tensor, rows: Rows) -> ParameterState:
        """Return a copy of a parameter's state, with duals for what has the parameter's shape."""
        duals: ParameterState = {}
        for name, value in state.items():
            if isinstance(value, Tensor):
                value = value.detach().clone()
                if _is_like(value, parameter):
                    # What a round begins with is a constant of it.
                    tangents = self.states[position].get(name)
                    tangent = torch.zeros_like(value) if tangents is None else tangents[rows].clone()
                    value = dual_of(value, tangent)
            duals[name] = value
        return duals

    def _advance(
        self, position: int, parameter: Tensor, dual: Tensor, factor: float, rows: Rows, own_factors: Tensor | None
    ) -> None:
        """Make the step of one tangent."""
        values = self.values[position]
        assert values is not None
        end, end_tangent = parts_of(dual)
        before = values[rows]
        assert end_tangent is not None
        slope = (end - parameter.detach()).add_(end_tangent - before, alpha=factor)
        if own_factors is not None:
            slope.mul_(own_factors.to(slope).reshape(-1, *[1] * (slope.ndim - 1)))
        values[rows] = before + slope

    def _put_state(self, position: int, state: Mapping[str, Any], parameter: Tensor, rows: Rows) -> None:
        """Keep the tangents of a parameter's state after a step."""
        values = self.values[position]
        assert values is not None
        for name, value in state.items():
            if not (isinstance(value, Tensor) and _is_like(value, parameter)):
                continue
            tangent = parts_of(value)[1]
            if tangent is None:
                continue
            if name not in self.states[position]:
                self.states[position][name] = torch.zeros_like(values, dtype=value.dtype)
            self.states[position][name][rows] = tangent


class _SafeRoots(TorchFunctionMode):
    """Functions of optimizers whose derivative torch lacks, or has as NaN.

    The root of 0 has the derivative 0: it is that of a second moment, which is 0 only where every gradient was exactly
    0, as behind a dead ReLU, and then so is its change. ``maximum`` into given memory has no derivative at all.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        options = dict(kwargs or {})
        if func in (torch.sqrt, Tensor.sqrt):
            return _safe_root(args[0])
        if func is Tensor.sqrt_:
            return args[0].copy_(_safe_root(args[0]))
        if func is torch.maximum and options.get("out") is not None:
            return options["out"].copy_(torch.maximum(*args))
        return func(*args, **options)


def _safe_root(value: Tensor) -> Tensor:
    is_zero = value == 0
    root = torch.where(is_zero, torch.ones_like(value), value).sqrt()
    return torch.where(is_zero, torch.zeros_like(value), root)


def _zeros(parameter: Tensor | None) -> Tensor | None:
    if parameter is None:
        return None
    return torch.zeros_like(parameter, requires_grad=False)


def _is_like(value: Tensor, parameter: Tensor) -> bool:
    """Return whether a state holds a number for each element of its parameter."""
    return value.ndim > 0 and value.shape == parameter.shape and value.is_floating_point()


def constant_factor(lr_scale: LocalLRScale | None) -> float:
    """Return the factor of a rule that learns it; without a scale it is 1."""
    if lr_scale is None:
        return 1.0
    if lr_scale.constant is None:
        raise ValueError(
            f"`{type(lr_scale).__name__}` has no `constant` factor, and only of such a one the derivative is known. Set"
            " `constant`, or leave out `needs_rate_tangents`."
        )
    return lr_scale.constant


# ---------------------------------------------------------------------- the trial


def check_tangents(optimizer: Optimizer, initial: OptimizerStates) -> None:
    """Hold the tangents of an optimizer's steps against central differences, on a few numbers.

    Args:
        optimizer: The user's optimizer, which is not changed.
        initial: Its states before the first step.

    Raises:
        ValueError: If it has no derivative, or a wrong one.
    """
    name = type(optimizer).__name__
    state: ParameterState = {}
    if initial:
        state = next(iter(initial.values()))
    width = 1e-5
    for group in optimizer.param_groups:
        try:
            _, tangent = _trial(optimizer, group, state, 1.0)
            above, _ = _trial(optimizer, group, state, 1.0 + width)
            below, _ = _trial(optimizer, group, state, 1.0 - width)
        except Exception as error:
            # Optimizers of any library may be given, and may raise anything.
            raise ValueError(
                f"The clients' learning rate cannot be learned with `{name}`, whose step has no derivative"
                f" ({str(error).partition(chr(10))[0]}). Use SGD, Adam, AdamW or RMSprop."
            ) from error
        difference = (above - below) / (2 * width)
        # Also false for NaN.
        if not torch.allclose(tangent, difference, rtol=1e-5, atol=1e-7):
            raise ValueError(
                f"The clients' learning rate cannot be learned with `{name}`: the derivative of its step"
                f" ({tangent.tolist()}) is not the central difference ({difference.tolist()}). Use SGD, Adam, AdamW or"
                " RMSprop."
            )


def _trial(
    optimizer: Optimizer, group: Mapping[str, Any], initial: Mapping[str, Any], factor: float
) -> tuple[Tensor, Tensor]:
    """Make a few steps on ``sum of c w^2 / 2 - b w``, with one element without a gradient.

    Returns:
        The end, and its tangent.
    """
    generator = stream(0, "rate tangents")
    start = torch.randn(4, generator=generator, dtype=torch.float64)
    pull = torch.randn(4, generator=generator, dtype=torch.float64)
    curvature = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64)
    pull[-1] = 0.0
    parameter = start.clone()
    state: OptimizerState = defaultdict(dict)
    for name, value in initial.items():
        if isinstance(value, Tensor):
            value = value.cpu().clone()
            if value.ndim:
                value = torch.full_like(parameter, value.flatten()[0].item())
        state[parameter][name] = value
    copy = rebind_optimizer(optimizer, [parameter] * sum(1 for _ in parameters_of(optimizer)), state)
    copy.param_groups = [{**group, **_without_kernels(group), "params": [parameter], "lr": 0.1}]
    tangents = RateTangents(copy, [parameter])
    for _ in range(4):
        before = parameter.clone()
        parameter.grad = curvature * parameter - pull
        value = tangents.values[0]
        assert value is not None
        tangents.slopes[0] = curvature * value
        tangents.step([parameter], state, factor)
        copy.step()
        parameter.copy_(torch.lerp(before, parameter, torch.tensor(factor, dtype=torch.float64)))
    end_tangent = tangents.values[0]
    assert end_tangent is not None
    return parameter, end_tangent

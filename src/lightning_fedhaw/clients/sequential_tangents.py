"""The tangents of the client that trains in the sequential engine, carried along its own steps."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_fedhaw.clients.engine import GradientSlope
from lightning_fedhaw.clients.steps import BatchData, Terms, parameters_of
from lightning_fedhaw.clients.tangents import OptimizerState, RateTangents
from lightning_fedhaw.vectors.layout import ParameterLayout

TOLERANCE = 0.05
"""How far the gradient of a step may be from the one whose change is known, relative to its length."""


class SequentialTangents:
    """The tangents of one client at a time.

    The client's own step stays as it is. Before it, the gradient of its batch is computed once more, on dual numbers.

    Args:
        optimizer: The user's optimizer.
        layout: The trainable parameters.
        gradient_slope: Computes gradients and their change.
        factor: The factor on the steps.
    """

    def __init__(
        self, optimizer: Optimizer, layout: ParameterLayout, gradient_slope: GradientSlope, factor: float
    ) -> None:
        self.optimizer = optimizer
        self.layout = layout
        self.gradient_slope = gradient_slope
        self.factor = factor
        self.parameters: list[Tensor] = []
        self.tangents: RateTangents
        self._position_of: dict[int, int] = {}
        self._gradient: Tensor | None = None
        self._is_compared = False
        self._before: list[Tensor] = []
        self._state_before: OptimizerState = defaultdict(dict)
        # Gradients are final (clipped, and computed at all) when the step is over, and not before.
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._carry),
        ]

    def close(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()

    def begin(self, parameters: list[Tensor]) -> None:
        """Begin with a client.

        Args:
            parameters: The module's trainable parameters, in the layout's order.
        """
        self.parameters = parameters
        self._position_of = {id(parameter): number for number, parameter in enumerate(parameters)}
        self.tangents = RateTangents(self.optimizer, [parameter.detach() for parameter in self._in_groups()])

    def _in_groups(self) -> list[Tensor]:
        return list(parameters_of(self.optimizer))

    def vector(self) -> Tensor:
        """Return the tangent of the client's model ``[P]``."""
        tangents = []
        by_id = dict(zip(map(id, self._in_groups()), self.tangents.values, strict=True))
        for parameter in self.parameters:
            value = by_id.get(id(parameter))
            tangents.append(torch.zeros_like(parameter) if value is None else value)
        return self.layout.read(tangents)

    def see(self, data: BatchData, batch_idx: int, terms: Terms | None) -> None:
        """Compute how the gradient of the coming step changes.

        Args:
            data: The batch, on the model's device.
            batch_idx: Its number.
            terms: The terms of client objectives.
        """
        vector = self.layout.read(self.parameters)
        gradient, slope = self.gradient_slope(vector, self.vector(), data, batch_idx, terms)
        self._gradient = gradient
        slopes = list(self.layout.views(slope).values())
        for position, parameter in enumerate(self._in_groups()):
            number = self._position_of.get(id(parameter))
            target = self.tangents.slopes[position]
            if number is not None and target is not None:
                target.copy_(slopes[number])

    @torch.no_grad()
    def _remember(self, *_: object) -> None:
        """Copy parameters and states before the optimizer's step."""
        self._before = []
        self._state_before = defaultdict(dict)
        for parameter in self._in_groups():
            copy = parameter.detach().clone()
            self._before.append(copy)
            for name, value in self.optimizer.state.get(parameter, {}).items():
                self._state_before[copy][name] = value.clone() if isinstance(value, Tensor) else value

    @torch.no_grad()
    def _carry(self, *_: object) -> None:
        """Carry the tangents through the step that the optimizer has made."""
        assert self._gradient is not None
        if not self._is_compared:
            self._compare(self._gradient)
            self._is_compared = True
        for parameter, before in zip(self._in_groups(), self._before, strict=True):
            before.grad = parameter.grad
        self.tangents.step(self._before, self._state_before, self.factor)

    def _compare(self, gradient: Tensor) -> None:
        """Refuse a step whose gradient is another one than that whose change is known.

        Raises:
            ValueError: If it is.
        """
        difference = torch.zeros((), device=gradient.device)
        for parameter, expected in zip(self.parameters, self.layout.views(gradient).values(), strict=True):
            given = parameter.grad
            if given is None:
                given = torch.zeros_like(expected)
            difference += (given - expected).float().square().sum()
        if not difference.sqrt() <= TOLERANCE * torch.linalg.vector_norm(gradient) + 1e-6:
            raise ValueError(
                "The derivative in the clients' learning rate is that of the loss that `training_step` returns, and the"
                " optimizer is given another gradient: a hook changes gradients, or two passes over a batch differ."
                " Leave the hook out, or use `FedHyperCallback('SL')`, which needs no derivative."
            )

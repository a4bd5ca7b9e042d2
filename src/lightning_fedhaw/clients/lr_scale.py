"""The scale of the clients' learning rates that a rule sets: applied to one client, and to many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import EllipsisType

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_fedhaw.rule import LocalLRScale


class ScaledSteps:
    """The optimizer steps of one client, or of a stack of clients, scaled after they were made.

    Args:
        lr_scale: The rule's scale.
        names: The parameters' names.
        state: The clients' states of the scale, ``[...]`` and ``[..., *shape]``.
    """

    def __init__(self, lr_scale: LocalLRScale, names: Sequence[str], state: dict[str, Tensor]) -> None:
        self.lr_scale = lr_scale
        self.names = names
        self.state = state

    @torch.no_grad()
    def scale(
        self,
        parameters: Sequence[Tensor],
        previous: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        rows: slice | Tensor | EllipsisType = ...,
    ) -> None:
        """Scale a step that was made.

        Args:
            parameters: The parameters after the step, ``[..., *shape]`` each; changed in place.
            previous: The parameters before the step.
            gradients: The gradients that the optimizer was given; ``None`` for a parameter that was not used.
            rows: The clients of the call, as an index into the states; all of them by default.
        """
        gradient_of = {}
        for name, start, gradient in zip(self.names, previous, gradients, strict=True):
            gradient_of[name] = torch.zeros_like(start) if gradient is None else gradient
        state = {name: value[rows] for name, value in self.state.items()}
        factor, new_state = self.lr_scale.factor(gradient_of, state)
        for parameter, start in zip(parameters, previous, strict=True):
            # The factor has the clients' axes only; ones for the parameter's own axes let it broadcast.
            weight = factor.reshape(factor.shape + (1,) * (start.ndim - factor.ndim)).to(start)
            parameter.copy_(torch.lerp(start, parameter, weight))
        # Last, because the factor may be a view of a state.
        for name, value in new_state.items():
            self.state[name][rows] = value


class ScaledOptimizer:
    """An optimizer whose every step is scaled, by hooks, for one client at a time.

    Args:
        optimizer: The user's optimizer.
        parameters: The trainable parameters, in the layout's order.

    Attributes:
        scaled_steps: The scale of the client that trains; set before each client.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.scaled_steps: ScaledSteps | None = None
        self._previous: list[Tensor] = []
        # Gradients are final (accumulated, unscaled, clipped) when the step is over, and not before.
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._copy_parameters),
            optimizer.register_step_post_hook(self._scale_step),
        ]

    def close(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _copy_parameters(self, *_: object) -> None:
        self._previous = [parameter.detach().clone() for parameter in self.parameters]

    def _scale_step(self, *_: object) -> None:
        assert self.scaled_steps is not None
        gradients = [parameter.grad for parameter in self.parameters]
        self.scaled_steps.scale(self.parameters, self._previous, gradients)


def initial_scale_states(
    lr_scale: LocalLRScale,
    clients: Sequence[tuple[Mapping[str, Tensor], int]],
    rates: Sequence[float],
    own_scales: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Return the clients' states of the scale when a round begins, ``[clients, ...]`` each.

    Args:
        lr_scale: The rule's scale.
        clients: For each client, the model that it starts from and its number of optimizer steps.
        rates: The learning rate of each parameter tensor, in the layout's order.
        own_scales: The clients' own factors on the rates; 1 by default.
    """
    states = []
    for number, (start, num_steps) in enumerate(clients):
        own_rates = rates
        if own_scales is not None:
            own_rates = [rate * own_scales[number] for rate in rates]
        states.append(lr_scale.begin(start, num_steps, own_rates))
    stacks = {}
    for name in states[0]:
        stacks[name] = torch.stack([state[name] for state in states])
    return stacks

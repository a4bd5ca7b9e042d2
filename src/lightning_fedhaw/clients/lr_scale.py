"""A rule's factor on local steps, for one client and for many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.rule import LocalLRScale


class ScaledSteps:
    """Scales each change that an optimizer makes to parameters, of one client or of a stack.

    Args:
        lr_scale: The rule's part.
        names: The parameters' names.
        state: The clients' states, ``[...]`` and ``[..., *shape]``.
    """

    def __init__(self, lr_scale: LocalLRScale, names: Sequence[str], state: dict[str, Tensor]) -> None:
        self.lr_scale, self.names, self.state = lr_scale, names, state

    @torch.no_grad()
    def scale(
        self, parameters: Sequence[Tensor], before: Sequence[Tensor], gradients: Sequence[Tensor | None], at: Any = ...
    ) -> None:
        """Scale a step that was made.

        Args:
            parameters: After the step, ``[..., *shape]`` each; changed in place.
            before: Before it.
            gradients: What the optimizer was given; ``None`` for a parameter that was not used.
            at: The clients of the call, as an index into the states.
        """
        given = {
            name: torch.zeros_like(old) if gradient is None else gradient
            for name, old, gradient in zip(self.names, before, gradients, strict=True)
        }
        factor, after = self.lr_scale.factor(given, {name: value[at] for name, value in self.state.items()})
        for parameter, old in zip(parameters, before, strict=True):
            weight = factor.reshape(factor.shape + (1,) * (old.ndim - factor.ndim)).to(old)
            parameter.copy_(torch.lerp(old, parameter, weight))
        # Last: the factor may be a view of a state.
        for name, value in after.items():
            self.state[name][at] = value


class ScaledOptimizer:
    """Does so for one client at a time, whoever calls the optimizer's ``step``.

    Args:
        optimizer: The user's optimizer.
        parameters: The trainable parameters, in the layout's order.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.scaled_steps: ScaledSteps | None = None
        # Gradients are final (accumulated, unscaled, clipped) when the step is over, and not before.
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def close(self) -> None:
        """Leave the optimizer alone."""
        for handle in self._handles:
            handle.remove()

    def _before(self, *_: Any) -> None:
        self._old = [parameter.detach().clone() for parameter in self.parameters]

    def _after(self, *_: Any) -> None:
        assert self.scaled_steps is not None
        self.scaled_steps.scale(self.parameters, self._old, [parameter.grad for parameter in self.parameters])


def begin(
    lr_scale: LocalLRScale, clients: Sequence[tuple[Mapping[str, Tensor], int]], rates: Sequence[float]
) -> dict[str, Tensor]:
    """The states of clients, ``[clients, ...]`` each.

    Args:
        lr_scale: The rule's part.
        clients: The model that each starts from, and the steps it is going to make.
        rates: The learning rate of each parameter tensor, in the layout's order.
    """
    states = [lr_scale.begin(start, num_steps, rates) for start, num_steps in clients]
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}

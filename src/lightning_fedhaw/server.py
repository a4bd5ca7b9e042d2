"""The global model: its flat parameters, its buffers, and a differentiable loss of any flat vector."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fedhaw.layout import ParameterLayout


class Server:
    """Holds the global parameters and buffers, and puts them into the user's module.

    Args:
        module: The user's LightningModule; it stores the global model between rounds.
        layout: Where each trainable parameter lives in the flat vector.
        proxy_dataset: The server's own data, for rules that want some.
    """

    def __init__(self, module: nn.Module, layout: ParameterLayout, proxy_dataset: Any = None) -> None:
        self.module = module
        self.proxy_dataset = proxy_dataset
        self.layout = layout
        self._vector = layout.read(layout.tensors(module))
        self.buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}

    def parameters(self) -> Tensor:
        """The global parameters ``[P]``. Read only: a rule returns new ones instead of changing these."""
        return self._vector

    @torch.no_grad()
    def install(self, parameters: Tensor, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Make these the global parameters ``[P]`` and buffers, and put both into the module.

        Raises:
            ValueError: If the vector has another shape than ``[P]``.
            FloatingPointError: If it holds NaN or infinity; the old parameters stay.
        """
        if parameters.shape != (self.layout.numel,):
            raise ValueError(
                f"A rule must return parameters of the shape [{self.layout.numel}], got {list(parameters.shape)}."
            )
        if not all_finite(parameters):
            raise FloatingPointError(
                "The rule returned non-finite global parameters, which were not installed. Lower the rule's step sizes,"
                " or bound what it learns (for FedHAW: `scale_bounds=(0.5, 2.0)`)."
            )
        self._vector = parameters.detach().to(self._vector)
        if buffers is not None:
            self.buffers = {name: buffers[name].detach().clone() for name in self.buffers}
        self.write(self._vector, self.buffers)

    def put_back(self, parameters: Tensor, buffers: dict[str, Tensor]) -> None:
        """Make parameters and buffers that were the server's before its own again, after a round that failed."""
        self._vector, self.buffers = parameters, buffers
        self.write(parameters, buffers)

    @torch.no_grad()
    def write(self, parameters: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Put parameters ``[P]`` and buffers into the module without making them the server's."""
        # By name, whatever is trainable at the moment: this also runs when a fit is interrupted.
        named = dict(self.module.named_parameters())
        self.layout.write(parameters, [named[name] for name in self.layout.names])
        own = dict(self.module.named_buffers())
        for name, value in buffers.items():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)
            else:  # an interrupted step had put something else in its place
                owner, _, leaf = name.rpartition(".")
                setattr(self.module.get_submodule(owner), leaf, value.clone())

    def loss(self, vector: Tensor, batch: Any, batch_idx: int = 0) -> Tensor:
        """The module's training loss at any parameters, differentiable with respect to them.

        The module itself is left alone: buffers that the step changes are copies.

        Args:
            vector: ``[P]``.
            batch: What the module's ``training_step`` takes.
            batch_idx: Its second argument, where it has one.

        Returns:
            A scalar.

        Raises:
            ValueError: If ``training_step`` gives no loss.
        """
        state = {f"module.{name}": view for name, view in self.layout.views(vector).items()}
        state |= {f"module.{name}": buffer.detach().clone() for name, buffer in self.module.named_buffers()}
        output = torch.func.functional_call(_Step(self.module), state, (batch, batch_idx), tie_weights=True)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError("`training_step` must return a loss, or a dict with the key 'loss', got no loss.")
        return loss


class _Step(nn.Module):
    """Lets ``functional_call`` reach ``training_step``, with what it logs going nowhere."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any, batch_idx: int) -> Any:
        module: Any = self.module
        own_log = module.__dict__.get("log")
        module.log = _ignore
        try:
            return module.training_step(*step_arguments(module.training_step, batch, batch_idx)[:2])
        finally:
            if own_log is None:
                del module.log
            else:
                module.log = own_log


def step_arguments(step: Callable[..., Any], batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """The arguments of a ``*_step`` method, whose ``batch_idx`` and ``dataloader_idx`` are optional."""
    kinds = [p.kind for p in inspect.signature(step).parameters.values()]
    named = sum(kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    if Parameter.VAR_POSITIONAL in kinds:
        named = max(named, 2)
    return (batch, batch_idx, 0)[: max(named, 1)]


@torch.no_grad()
def averaged_buffers(
    server: Mapping[str, Tensor], clients: Iterable[Mapping[str, Tensor]], weights: Tensor
) -> dict[str, Tensor]:
    """Buffers of the new global model under the policy ``"average"``.

    Floating-point buffers move by the weighted mean of the clients' changes, so a buffer that nobody changes stays
    what it is to the last bit; they are never multiplied by a rule's scale. Integer buffers (step counters) take the
    maximum.

    Args:
        server: The buffers that were broadcast.
        clients: The K clients' buffers after training; one that is absent did not change.
        weights: ``[K]``, summing to one.
    """
    rows = list(clients)
    merged: dict[str, Tensor] = {}
    for name, own in server.items():
        stack = torch.stack([row.get(name, own).to(own.device) for row in rows])
        if own.is_floating_point() or own.is_complex():
            wide = torch.promote_types(own.dtype, torch.float32)
            # An infinity that nobody changes (a mask) is no change.
            changes = torch.where(stack == own, 0, stack.to(wide) - own.to(wide))
            change = torch.tensordot(weights.to(own.device, wide), changes, dims=1)
            merged[name] = (own.to(wide) + change).to(own.dtype)
        else:
            merged[name] = stack.amax(0) if own.dtype != torch.bool else stack.any(0)
    return merged


def all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite, in one read of the tensor where it is."""
    # A finite sum proves it without a temporary; a sum can overflow, though, so the other answer is checked.
    if torch.isfinite(tensor.sum()):
        return True
    return bool(torch.isfinite(tensor).all())


def _ignore(*_: Any, **__: Any) -> None:
    return None

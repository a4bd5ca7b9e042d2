"""One optimizer step of a client, in three ways: plain SGD without an optimizer object, automatic, manual."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor

from lightning_fedhaw.data.client_data import Batch
from lightning_fedhaw.objectives.base import ClientObjective, ClientState, Named
from lightning_fedhaw.vectors.layout import ParameterLayout


class Host(Protocol):
    """What an engine needs of the trainer around it; the round loop provides it."""

    module: Any
    scaler: Any
    device: torch.device

    @property
    def callbacks(self) -> Sequence[Any]:
        """The callbacks whose hooks are called while clients train."""

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """The module's optimizers."""

    @property
    def accumulate(self) -> int:
        """Batches behind one optimizer step."""

    @property
    def round(self) -> int:
        """The round that is being played."""

    @property
    def is_plain_sgd(self) -> bool:
        """Whether a step needs no optimizer object, precision plugin or hook."""

    @property
    def clipping(self) -> tuple[float, str] | None:
        """The bound of gradient clipping, and ``"norm"`` or ``"value"``; ``None`` without."""

    @property
    def obstacle(self) -> str | None:
        """What in trainer or module keeps many clients' steps from being one batched call; ``None`` if nothing."""

    @property
    def can_evaluate(self) -> bool:
        """Whether a client's data can be run through the module without training on it."""

    def prepare(self, data: Any) -> Any:
        """Convert a batch to the precision and move it to the device."""

    def arguments(self, data: Any, batch_idx: int) -> tuple[Any, ...]:
        """The arguments of ``training_step``."""

    def on_batch_start(self, data: Any, batch_idx: int) -> bool:
        """Call the hooks before a local step; true if the module asks to skip the rest of the pass."""

    def on_batch_end(self, outputs: Any, data: Any, batch_idx: int) -> None:
        """Call the hooks after a local step."""

    def before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Call the hooks before gradients are cleared."""

    def learning_rates(self, layout: ParameterLayout) -> tuple[float, ...]:
        """The learning rate of each parameter tensor in the layout's order, as scheduled for this round."""

    def forward(self, data: Any, batch_idx: int) -> Any:
        """Call ``training_step`` in the trainer's precision, without hooks or optimizers."""

    def backward(self, loss: Tensor) -> None:
        """Form the gradients of a loss, through the precision plugin and the hooks around it."""

    def step_context(self) -> AbstractContextManager[Any]:
        """The context of a training step in the precision that is computed in at the moment."""

    def computing_in(self, precision: Precision) -> AbstractContextManager[None]:
        """Compute in another precision for a while."""

    def logging_to(self, logger: Any) -> AbstractContextManager[None]:
        """Let another logger stand instead of the trainer's for a while."""

    def evaluate(self, data: Any, batch_idx: int) -> Any:
        """Call ``validation_step``; ``training_step`` where there is none."""

    def schedules(self) -> list[dict[str, Any]]:
        """The states of learning-rate schedules that the module steps itself."""

    def load_schedules(self, states: list[dict[str, Any]]) -> None:
        """Put such states back."""


class StepCounts:
    """Optimizer steps of one task: made, and tried but skipped."""

    def __init__(self) -> None:
        self.made = 0
        self.skipped = 0


def loss_of(output: Any) -> tuple[Tensor | None, dict[str, Any]]:
    """The loss in what ``training_step`` returned, and what else is in it.

    Raises:
        TypeError: If it is neither a tensor, nor a mapping with the key ``loss``, nor ``None``.
    """
    if output is None:
        return None, {}
    if isinstance(output, Tensor):
        return output, {}
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return output["loss"], {k: v for k, v in output.items() if k != "loss"}
    raise TypeError(
        "`training_step` must return a loss tensor, a dict with the key 'loss', or None to skip the step, got"
        f" {type(output).__name__}."
    )


class Terms:
    """What objectives add to the loss, or to its gradient.

    Args:
        objectives: The objectives.
        parameters: The trainable parameters, by name.
        start: The model the client started from.
        states: What the client works with, for each objective.
    """

    def __init__(
        self, objectives: Sequence[ClientObjective], parameters: Named, start: Named, states: Sequence[ClientState]
    ) -> None:
        self.parameters, self.start = parameters, start
        self.all = list(zip(objectives, states, strict=True))
        self.closed = [(objective, state) for objective, state in self.all if objective.is_closed]
        self.name_of = {parameter: name for name, parameter in parameters.items()}
        self.open = [(objective, state) for objective, state in self.all if not objective.is_closed]

    def added_to(self, loss: Tensor, terms: Sequence[tuple[ClientObjective, ClientState]]) -> Tensor:
        """A loss and some of the terms."""
        return sum((each.penalty(self.parameters, self.start, state) for each, state in terms), loss)

    @torch.no_grad()
    def add_closed_gradients(
        self,
        gradients: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        through: Callable[[Callable[..., Named]], Callable[..., Named]] = lambda gradient: gradient,
    ) -> Sequence[Tensor | None]:
        """Gradients, and those of the terms that have one in closed form.

        Args:
            gradients: ``None`` for a parameter that was not used.
            parameters: Whose gradients they are.
            through: Makes the terms' gradients serve a stack of clients.
        """
        for objective, state in self.closed:
            slopes = through(objective.gradient)(self.parameters, self.start, state)
            own = [slopes[self.name_of[parameter]].to(parameter.dtype) for parameter in parameters]
            gradients = [s if g is None else g + s for g, s in zip(gradients, own, strict=True)]
        return gradients


class PlainSGDStep:
    """SGD without momentum or decay: one ``autograd.grad`` and one in-place add, equal to ``SGD.step`` bit by bit."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def __call__(self, data: Any, batch: Batch, counts: StepCounts, terms: Terms | None) -> None:
        """Train on one batch. It gives nothing back: where a hook would look at it, this step is not taken."""
        loss, _ = loss_of(self.host.forward(data, batch.index))
        if loss is None:
            counts.skipped += 1
            return
        objective = loss if terms is None else terms.added_to(loss, terms.open)
        groups = self.host.optimizers[0].param_groups
        owned = [[p for p in group["params"] if p.requires_grad] for group in groups]
        trained = [p for own in owned for p in own]
        grads: Sequence[Tensor | None] = torch.autograd.grad(objective, trained, allow_unused=True)
        if terms is not None:
            grads = terms.add_closed_gradients(grads, trained)
        begin = 0
        with torch.no_grad():
            for group, own in zip(groups, owned, strict=True):
                given = grads[begin : begin + len(own)]
                begin += len(own)
                own = [p for p, change in zip(own, given, strict=True) if change is not None]
                changes = [change for change in given if change is not None]
                if own:
                    torch._foreach_add_(own, changes, alpha=-group["lr"])
        counts.made += 1
        # What `optimizer.step` would leave behind; a schedule that steps next looks for it.
        self.host.optimizers[0]._opt_called = True  # type: ignore[attr-defined]


class AutomaticStep:
    """Any optimizer and precision, with every hook of Lightning's own automatic optimization."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.executed = 0
        self._window_has_loss = False
        (self._wrapped,) = _as_list(host.module.optimizers())
        self._handle = host.optimizers[0].register_step_post_hook(self._count)

    def close(self) -> None:
        """Stop counting steps."""
        self._handle.remove()

    def __call__(self, data: Any, batch: Batch, counts: StepCounts, terms: Terms | None) -> Any:
        """Train on one batch; what ``training_step`` returned, without its graph."""
        host, result = self.host, {}

        def closure() -> Tensor | None:
            loss, extra = loss_of(host.forward(data, batch.index))
            if batch.index % host.accumulate == 0:
                host.before_zero_grad(self._wrapped)
                host.module.optimizer_zero_grad(host.round, batch.index, self._wrapped)
            if loss is None:
                return None
            result.update({"loss": loss.detach().clone(), **extra})
            self._window_has_loss = True
            objective = (loss if terms is None else terms.added_to(loss, terms.all)) / host.accumulate
            host.backward(objective)
            accumulated: Tensor = result["loss"] / host.accumulate
            return accumulated

        if (batch.index + 1) % host.accumulate and not batch.last:
            closure()
            return result
        before = self.executed
        with torch.enable_grad():
            host.module.optimizer_step(host.round, batch.index, self._wrapped, closure)
        if self.executed > before and self._window_has_loss:
            counts.made += 1
        else:
            counts.skipped += 1
        self._window_has_loss = False
        return result

    def _count(self, *_: Any) -> None:
        self.executed += 1


class ManualStep:
    """Manual optimization: ``training_step`` steps its optimizers itself; the busiest one is counted."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.executed = [0] * len(host.optimizers)
        self._handles = [o.register_step_post_hook(self._counter(i)) for i, o in enumerate(host.optimizers)]

    def close(self) -> None:
        """Stop counting steps."""
        for handle in self._handles:
            handle.remove()

    def __call__(self, data: Any, batch: Batch, counts: StepCounts, terms: Terms | None) -> Any:
        """Train on one batch; what ``training_step`` returned, without its graph."""
        before = list(self.executed)
        scale = self.host.scaler.get_scale() if self.host.scaler is not None else 0.0
        output = self.host.forward(data, batch.index)
        counts.made += max(now - then for now, then in zip(self.executed, before, strict=True))
        if self.host.scaler is not None and self.host.scaler.get_scale() < scale:
            counts.skipped += 1
        return output

    def _counter(self, index: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self.executed[index] += 1

        return count


def is_plain_sgd(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Whether an optimizer does nothing but subtract the gradient times the learning rate from these parameters."""
    if (
        type(optimizer) is not torch.optim.SGD
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
    ):
        return False
    own = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if own != set(parameters) or any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters):
        return False
    return not any(
        group[option]
        for group in optimizer.param_groups
        for option in ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "differentiable")
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

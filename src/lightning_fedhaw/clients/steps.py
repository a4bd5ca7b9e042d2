"""One optimizer step of a client, in three ways: plain SGD without an optimizer object, automatic, manual."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.optim import Optimizer

from lightning_fedhaw.data.client_data import Batch
from lightning_fedhaw.objectives.base import ClientObjective, ClientState, Named
from lightning_fedhaw.objectives.view import StepWatch
from lightning_fedhaw.vectors.layout import ParameterLayout

BatchData = Any
"""What ``training_step`` is given as its batch; any collection of tensors, as in Lightning."""

StepOutput = Any
"""What ``training_step`` returns: a loss, a mapping with the key ``loss``, or ``None``, as in Lightning."""

ScheduleStates = list[dict[str, Any]]
"""The state of each learning-rate schedule."""

Term = tuple[ClientObjective, ClientState]
"""A client objective, with the state in which one client uses it."""


class Validation(Protocol):
    """What the evaluation of clients needs of the trainer around it; the hooks of a stock validation are called."""

    @property
    def collate_fn(self) -> Callable[[list[Any]], BatchData] | None:
        """The function by which validation makes batches; ``None`` if there is no validation, or it makes none."""

    @property
    def batch_size(self) -> int | None:
        """The batch size of validation; ``None`` if there is no validation, or its loader has no fixed one."""

    def stage(self) -> AbstractContextManager[None]:
        """Return a context in which the trainer validates, and logs nothing."""

    def start(self) -> None:
        """Put the module into evaluation mode, and call the hooks at the start of a validation."""

    def step(self, data: BatchData, batch_idx: int) -> None:
        """Move a batch to the device and run it through ``validation_step``, between its hooks."""

    def epoch_end(self) -> None:
        """Call the hook in which a module logs what it has collected."""

    def end(self) -> None:
        """Call the hook at the end of a validation."""


class BatchProgress(Protocol):
    """The part of the trainer's progress that says whether this is the last batch.

    Attributes:
        is_last_batch: What ``trainer.is_last_batch`` returns.
    """

    is_last_batch: bool


class Host(Protocol):
    """What an engine needs of the trainer around it; the round loop provides it."""

    module: pl.LightningModule
    scaler: torch.amp.GradScaler | None
    device: torch.device
    nonfinite_buffers: frozenset[str]
    """Names of buffers that were NaN or infinite when ``fit`` was called, and may be so again."""
    client: object
    """The client whose data the module is given; ``None`` at other times. The module can ask for it."""

    @property
    def callbacks(self) -> Sequence[pl.Callback]:
        """The callbacks whose hooks are called while clients train."""

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The module's optimizers."""

    @property
    def accumulate(self) -> int:
        """The number of batches for each optimizer step."""

    @property
    def round(self) -> int:
        """The number of the current round, from 0."""

    @property
    def is_plain_sgd(self) -> bool:
        """Whether a step needs no optimizer object, precision plugin or hook."""

    @property
    def clipping(self) -> tuple[float, str] | None:
        """The bound of gradient clipping, and ``"norm"`` or ``"value"``; ``None`` without clipping."""

    @property
    def obstacle(self) -> str | None:
        """The reason why many clients' steps cannot be one batched call, if trainer or module give one."""

    @property
    def can_evaluate(self) -> bool:
        """Whether a client's data can be run through the module without training on it."""

    def prepare(self, data: BatchData) -> BatchData:
        """Convert a batch to the precision and move it to the device."""

    def arguments(self, data: BatchData, batch_idx: int) -> tuple[object, ...]:
        """Return the arguments of ``training_step``, whose ``batch_idx`` is optional."""

    def stop_if_asked(self) -> None:
        """Raise an error if the process was asked to end, between two batches."""

    def on_batch_start(self, data: BatchData, batch_idx: int) -> bool:
        """Call the hooks before a local step; true if the module asks to skip the remaining batches of the pass."""

    def on_batch_end(self, outputs: StepOutput, data: BatchData, batch_idx: int) -> None:
        """Call the hooks after a local step."""

    def before_zero_grad(self, optimizer: Optimizer) -> None:
        """Call the hooks before gradients are cleared."""

    def learning_rates(self, layout: ParameterLayout) -> tuple[float, ...]:
        """Return the learning rate of each parameter tensor in the layout's order, as scheduled for this round."""

    def forward(self, data: BatchData, batch_idx: int) -> StepOutput:
        """Call ``training_step`` in the trainer's precision, without hooks or optimizers."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss, through the precision plugin and the hooks around it."""

    def step_context(self) -> AbstractContextManager[object]:
        """Return the context of a training step in the current precision."""

    def computing_in(self, precision: Precision) -> AbstractContextManager[None]:
        """Compute in another precision inside the context."""

    def logging_to(self, logger: object) -> AbstractContextManager[None]:
        """Replace the trainer's loggers by another one inside the context."""

    @property
    def validation(self) -> Validation:
        """The validation of clients one by one."""

    def client_pass(self, num_batches: int) -> AbstractContextManager[BatchProgress]:
        """Let the trainer's numbers of batches be those of one client inside the context.

        Args:
            num_batches: The number of batches in a pass over the client's data.
        """

    def schedules(self) -> ScheduleStates:
        """Return the states of learning-rate schedules that the module steps itself."""

    def load_schedules(self, states: ScheduleStates) -> None:
        """Restore the states that :meth:`schedules` returned."""


@contextmanager
def turns(host: Host) -> Iterator[None]:
    """Let clients take turns inside the context; at its end it is nobody's."""
    try:
        yield
    finally:
        host.client = None


class StepCounts:
    """The number of optimizer steps of one task: made, and tried but skipped."""

    def __init__(self) -> None:
        self.made = 0
        self.skipped = 0


def loss_of(output: StepOutput) -> tuple[Tensor | None, dict[str, object]]:
    """Return the loss in the output of ``training_step``, and the other entries of the output.

    Raises:
        TypeError: If the output is neither a tensor, nor a mapping with the key ``loss``, nor ``None``.
    """
    if output is None:
        return None, {}
    if isinstance(output, Tensor):
        return output, {}
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        further = dict(output)
        del further["loss"]
        return output["loss"], further
    raise TypeError(
        "`training_step` must return a loss tensor, a dict with the key 'loss', or None to skip the step, got"
        f" {type(output).__name__}."
    )


def as_scalar(value: Tensor) -> Tensor:
    """Return a tensor with one element in the shape ``[]``; itself where it has that shape."""
    if value.ndim:
        return value.reshape(())
    return value


class Terms:
    """The terms that objectives add to the loss, or to its gradient.

    Args:
        objectives: The objectives.
        parameters: The trainable parameters, by name; without local ones, on which no term acts.
        start: The model the client started from, by name of the parameter.
        states: The client's state, for each objective.
        watch: Records the calls of a step, for objectives that read them; ``None`` if none does.

    Attributes:
        all: Every objective with its state.
        closed: Those whose gradient is known in closed form.
        open: Those that have to be differentiated.
    """

    def __init__(
        self,
        objectives: Sequence[ClientObjective],
        parameters: Named,
        start: Named,
        states: Sequence[ClientState],
        watch: StepWatch | None = None,
    ) -> None:
        self.parameters = parameters
        self.start = start
        self.watch = watch
        self.all: list[Term] = list(zip(objectives, states, strict=True))
        self.closed: list[Term] = []
        self.open: list[Term] = []
        for objective, state in self.all:
            terms = self.closed if objective.is_closed else self.open
            terms.append((objective, state))
        self.name_of = {parameter: name for name, parameter in parameters.items()}

    def added_to(self, loss: Tensor, terms: Sequence[Term]) -> Tensor:
        """Add some of the terms to a loss."""
        for objective, state in terms:
            loss = loss + objective.term(self.parameters, self.start, state, self.watch)
        return loss

    def watched(self, forward: Callable[[], StepOutput], batch: BatchData) -> StepOutput:
        """Call a ``training_step``, and record what objectives read of it."""
        if self.watch is None:
            return forward()
        with self.watch.watching(batch):
            self.watch.output = forward()
        return self.watch.output

    @torch.no_grad()
    def add_closed_gradients(
        self,
        gradients: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        transform: Callable[[Callable[..., Named]], Callable[..., Named]] = lambda gradient: gradient,
    ) -> Sequence[Tensor | None]:
        """Add the gradients of the terms that have one in closed form.

        Args:
            gradients: The gradient of each parameter; ``None`` for a parameter that was not used.
            parameters: The parameters.
            transform: Makes an objective's ``gradient`` serve a stack of clients, such as ``torch.func.vmap``.

        Returns:
            The sums, in the order of the parameters.
        """
        for objective, state in self.closed:
            slopes = transform(objective.gradient)(self.parameters, self.start, state)
            sums: list[Tensor | None] = []
            for parameter, gradient in zip(parameters, gradients, strict=True):
                name = self.name_of.get(parameter)
                if name is None:
                    # A local parameter.
                    sums.append(gradient)
                    continue
                slope = slopes[name].to(parameter.dtype)
                # A term acts on a parameter even where the loss does not use it.
                sums.append(slope if gradient is None else gradient + slope)
            gradients = sums
        return gradients


def _forward(host: Host, data: BatchData, batch_idx: int, terms: Terms | None) -> StepOutput:
    """Call ``training_step``; with client objectives, record what they read of it."""
    if terms is None:
        return host.forward(data, batch_idx)
    return terms.watched(lambda: host.forward(data, batch_idx), data)


class LocalStep(Protocol):
    """A way to train on one batch."""

    def __call__(self, data: BatchData, batch: Batch, counts: StepCounts, terms: Terms | None) -> StepOutput:
        """Train on one batch.

        Args:
            data: The batch, on the model's device.
            batch: Its number, and whether it is the last of the pass.
            counts: Counts the optimizer step.
            terms: The terms of client objectives; ``None`` without objectives.

        Returns:
            The output of ``training_step`` without its graph, for hooks.
        """

    def close(self) -> None:
        """Remove what was attached to the optimizers."""


class PlainSGDStep:
    """SGD without momentum or decay: one ``autograd.grad`` and one in-place add, bit-identical to ``SGD.step``."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def close(self) -> None:
        """Do nothing: this step attaches nothing."""

    def __call__(self, data: BatchData, batch: Batch, counts: StepCounts, terms: Terms | None) -> None:
        """Train on one batch. Return nothing: where a hook would read the output, this step is not used."""
        loss, _ = loss_of(_forward(self.host, data, batch.index, terms))
        if loss is None:
            counts.skipped += 1
            return
        if terms is not None:
            loss = terms.added_to(loss, terms.open)
        optimizer = self.host.optimizers[0]
        # Read for every batch: the module may freeze parameters or change rates while a client trains.
        trainable_of_groups: list[list[Tensor]] = []
        for group in optimizer.param_groups:
            trainable_of_groups.append(trainable_among(group["params"]))
        parameters = list(chain.from_iterable(trainable_of_groups))
        gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, allow_unused=True)
        if terms is not None:
            gradients = terms.add_closed_gradients(gradients, parameters)
        remaining = iter(gradients)
        with torch.no_grad():
            for group, trainable in zip(optimizer.param_groups, trainable_of_groups, strict=True):
                used: list[Tensor] = []
                changes: list[Tensor] = []
                for parameter in trainable:
                    gradient = next(remaining)
                    if gradient is not None:
                        used.append(parameter)
                        changes.append(gradient)
                if used:
                    torch._foreach_add_(used, changes, alpha=-group["lr"])
        counts.made += 1
        # `optimizer.step` would set this; a schedule that steps next warns without it.
        optimizer._opt_called = True  # type: ignore[attr-defined]


class AutomaticStep:
    """Any optimizer and precision, with every hook of Lightning's own automatic optimization.

    Attributes:
        executed: How often the optimizer's ``step`` was executed; with loss scaling it may be skipped.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.executed = 0
        self._window_has_loss = False
        optimizers = host.module.optimizers()
        if isinstance(optimizers, list):
            (optimizer,) = optimizers
        else:
            optimizer = optimizers
        # Lightning's wrapper of the optimizer, which the module's hooks are given in automatic optimization, too.
        self._wrapped = cast(Optimizer, optimizer)
        self._handle = host.optimizers[0].register_step_post_hook(self._count)

    def close(self) -> None:
        """Stop counting steps."""
        self._handle.remove()

    def __call__(self, data: BatchData, batch: Batch, counts: StepCounts, terms: Terms | None) -> dict[str, object]:
        """Train on one batch, and return the output of ``training_step`` without its graph."""
        host = self.host
        outputs: dict[str, object] = {}

        def closure() -> Tensor | None:
            loss, other_outputs = loss_of(_forward(host, data, batch.index, terms))
            if batch.index % host.accumulate == 0:
                host.before_zero_grad(self._wrapped)
                host.module.optimizer_zero_grad(host.round, batch.index, self._wrapped)
            if loss is None:
                return None
            detached = loss.detach().clone()
            outputs.update({"loss": detached, **other_outputs})
            self._window_has_loss = True
            if terms is not None:
                loss = terms.added_to(loss, terms.all)
            host.backward(loss / host.accumulate)
            return detached / host.accumulate

        completes_window = (batch.index + 1) % host.accumulate == 0 or batch.last
        if not completes_window:
            closure()
            return outputs
        num_executed = self.executed
        with torch.enable_grad():
            host.module.optimizer_step(host.round, batch.index, self._wrapped, closure)
        # With loss scaling an overflow skips the step; without any loss in the window there is nothing to step on.
        if self.executed > num_executed and self._window_has_loss:
            counts.made += 1
        else:
            counts.skipped += 1
        self._window_has_loss = False
        return outputs

    def _count(self, *_: object) -> None:
        self.executed += 1


class ManualStep:
    """Manual optimization: ``training_step`` steps its optimizers itself; the one with most steps is counted.

    Attributes:
        executed: How often each optimizer's ``step`` was executed.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.executed = [0] * len(host.optimizers)
        self._handles = []
        for number, optimizer in enumerate(host.optimizers):
            self._handles.append(optimizer.register_step_post_hook(self._counter(number)))

    def close(self) -> None:
        """Stop counting steps."""
        for handle in self._handles:
            handle.remove()

    def __call__(self, data: BatchData, batch: Batch, counts: StepCounts, terms: Terms | None) -> StepOutput:
        """Train on one batch, and return the output of ``training_step``."""
        scaler = self.host.scaler
        executed_before = list(self.executed)
        scale_before = 0.0
        if scaler is not None:
            scale_before = scaler.get_scale()
        output = self.host.forward(data, batch.index)
        steps = [count - earlier for count, earlier in zip(self.executed, executed_before, strict=True)]
        counts.made += max(steps)
        # The loss scale falls when a step overflowed, and that step was skipped.
        if scaler is not None and scaler.get_scale() < scale_before:
            counts.skipped += 1
        return output

    def _counter(self, number: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            self.executed[number] += 1

        return count


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Return the parameters of an optimizer's groups, in their order."""
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def trainable_among(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters that are trainable now."""
    return [parameter for parameter in parameters if parameter.requires_grad]


def is_plain_sgd(optimizer: Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Return whether an optimizer only subtracts gradient times learning rate, from exactly these parameters."""
    if type(optimizer) is not torch.optim.SGD:
        return False
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    if set(trainable_among(parameters_of(optimizer))) != set(parameters):
        return False
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in parameters):
        return False
    for group in optimizer.param_groups:
        for option in ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "differentiable"):
            if group[option]:
                return False
    return True

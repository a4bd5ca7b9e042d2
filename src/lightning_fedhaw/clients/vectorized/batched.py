"""The ``training_step`` of many clients as one batched call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_fedhaw.clients.steps import Host, Terms, as_scalar, loss_of
from lightning_fedhaw.clients.vectorized.guard import StepGuard
from lightning_fedhaw.clients.vectorized.recorder import StackRecorder
from lightning_fedhaw.clients.vectorized.recurrent import following_parameters
from lightning_fedhaw.clients.vectorized.weighted import Counted
from lightning_fedhaw.objectives.base import ClientObjective, ClientState, Named, make_watch
from lightning_fedhaw.vectors.layout import ParameterLayout


class StepInputs(NamedTuple):
    """The inputs of one batched call.

    Attributes:
        parameters: ``[rows, *shape]`` each: all that clients train, in the layout's order.
        buffers: ``[rows, *shape]`` each; changed in place where the step changes its buffers in place.
        batch: ``[rows, batch, ...]`` each.
        batch_index: The second argument of ``training_step``.
        starts: With client objectives: the models that the clients started from, ``[rows, *shape]`` by name.
        states: With client objectives: the clients' states of each objective, ``[rows, *shape]`` by name.
        lengths: ``[rows]``, the number of samples of each batch that count, the first ones; ``None`` where all do.
    """

    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor]
    batch: Sequence[Tensor]
    batch_index: int
    starts: Named | None = None
    states: Sequence[ClientState] = ()
    lengths: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return all tensors as one list."""
        tensors = [*self.parameters, *self.buffers, *self.batch]
        if self.lengths is not None:
            tensors.append(self.lengths)
        if self.starts is not None:
            tensors += self.starts.values()
        for state in self.states:
            tensors += state.values()
        return tensors

    def first(self, rows: int) -> StepInputs:
        """Return the inputs of the first rows."""
        starts = None
        if self.starts is not None:
            starts = {name: value[:rows] for name, value in self.starts.items()}
        return StepInputs(
            parameters=[tensor[:rows].detach().requires_grad_() for tensor in self.parameters],
            buffers=[tensor[:rows] for tensor in self.buffers],
            batch=[tensor[:rows] for tensor in self.batch],
            batch_index=self.batch_index,
            starts=starts,
            states=[{name: value[:rows] for name, value in state.items()} for state in self.states],
            lengths=None if self.lengths is None else self.lengths[:rows],
        )


class StepOutputs(NamedTuple):
    """The outputs of one batched call.

    Attributes:
        losses: ``[rows]``, or ``None`` if the step gave no loss.
        replaced: Buffers that were replaced rather than changed in place, by their number.
        logged: ``[rows]`` each.
    """

    losses: Tensor | None
    replaced: Mapping[int, Tensor]
    logged: Sequence[Tensor]


class Gradients(NamedTuple):
    """The outputs of one batched call, with the gradients of its losses.

    Attributes:
        losses: ``[rows]``, or ``None`` if the step gave no loss.
        gradients: ``[rows, *shape]`` each; ``None`` for a parameter that was not used.
        replaced: Buffers that were replaced rather than changed in place, by their number.
        logged: ``[rows]`` each.
    """

    losses: Tensor | None
    gradients: Sequence[Tensor | None]
    replaced: Mapping[int, Tensor]
    logged: Sequence[Tensor]

    def buffers(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the buffers after the call.

        Args:
            inputs: The buffers that the call was given, some of which it changed in place.
        """
        buffers = list(inputs)
        for i, value in self.replaced.items():
            buffers[i] = value
        return buffers


class BatchedStep:
    """One call of the user's ``training_step`` for many clients, through one ``vmap``.

    During the call the module's own parameters and buffers are replaced by the clients', which are batched tensors, in
    the dicts that hold them. Tied parameters stay tied.

    Args:
        host: The trainer around it.
        layout: The trainable parameters.
        objectives: The terms that clients add to their loss.
        recorder: Receives the logged values.
        guard: Surrounds each client's step; its generators draw the clients' dropout masks.
        same_draws: Whether all clients are given the same random numbers other than dropout's, instead of each its own.
    """

    def __init__(
        self,
        host: Host,
        layout: ParameterLayout,
        objectives: Sequence[ClientObjective],
        recorder: StackRecorder,
        guard: StepGuard,
        same_draws: bool = False,
    ) -> None:
        self.host = host
        self.layout = layout
        self.objectives = objectives
        self.recorder = recorder
        self.guard = guard
        self.buffer_names = layout.buffers
        module = host.module
        self._parameter_slots = _slots_of(module, "_parameters", layout.trained_tensors(module))
        self._recurrent_layers = [layer for layer in module.modules() if isinstance(layer, nn.RNNBase)]
        self._buffer_slots = _slots_of(module, "_buffers", list(layout.tracked_buffers(module).values()))
        # A closed objective brings its gradient itself; an open one is part of the loss.
        self._open = [i for i, objective in enumerate(objectives) if not objective.is_closed]
        self._watch = make_watch(objectives, module, host.step_context)
        # Without a reference to this object: in a circle, every round's would wait for the garbage collector.
        this: Any = weakref.proxy(self)
        one = partial(BatchedStep._one, this)
        self._batched = torch.func.vmap(one, randomness="same" if same_draws else "different")
        # `vmap` passes tensors only. Other inputs and outputs of one client's step are attributes during a call.
        self._batch_index = 0
        self._counts = (0, 0, 0)
        self._state_names: list[list[str]] = []
        self._has_loss = True
        self._has_lengths = False
        self._replaced: list[int] = []

    def __call__(self, inputs: StepInputs) -> StepOutputs:
        """Compute the clients' losses."""
        parameters, buffers, batch, self._batch_index, starts, states, lengths = inputs
        self._counts = (len(parameters), len(buffers), len(batch))
        extra: list[Tensor] = []
        self._has_lengths = lengths is not None
        if lengths is not None:
            extra.append(lengths)
        if self._open and starts is not None:
            self._state_names = [list(states[i]) for i in self._open]
            extra += starts.values()
            for i in self._open:
                extra += states[i].values()
        with self.host.step_context():
            outputs = self._batched(*parameters, *buffers, *batch, *extra)
        losses: Tensor | None = None
        if self._has_loss:
            losses = outputs[0]
            outputs = outputs[1:]
        count = len(self._replaced)
        replaced = dict(zip(self._replaced, outputs[:count], strict=True))
        return StepOutputs(losses, replaced, [value.detach() for value in outputs[count:]])

    def gradients(self, trained: Sequence[int], inputs: StepInputs) -> Gradients:
        """Compute the losses, and the gradient of each client's loss.

        No row of the parameters is in another client's loss, so each row of the gradient of the sum of all losses is
        the gradient of one client's loss.

        Args:
            trained: The numbers of the parameters to differentiate with respect to.
            inputs: The inputs of the call.
        """
        losses, replaced, logged = self(inputs)
        if losses is None:
            return Gradients(None, [], replaced, logged)
        parameters = [inputs.parameters[i] for i in trained]
        gradients: Sequence[Tensor | None]
        gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        if inputs.starts is not None:
            # Without local parameters, which come last: no term acts on them.
            named = dict(zip(self.layout.names, inputs.parameters, strict=False))
            terms = Terms(self.objectives, named, inputs.starts, inputs.states)
            gradients = terms.add_closed_gradients(gradients, parameters, torch.func.vmap)
        return Gradients(losses.detach(), gradients, replaced, logged)

    def _one(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """Compute one client's step; inside of ``vmap`` tensors lack the axis of the clients."""
        remaining = iter(flat)
        num_parameters, num_buffers, num_data = self._counts
        parameters = list(islice(remaining, num_parameters))
        buffers = list(islice(remaining, num_buffers))
        batch = list(islice(remaining, num_data))
        self.guard.ticket = batch[0]
        self.guard.trainable = frozenset(map(id, parameters))
        if self._has_lengths:
            self.guard.counted = Counted(len(batch[0]), next(remaining))
        with (
            _substituted(self._parameter_slots, parameters),
            _substituted(self._buffer_slots, buffers) as read_back,
            following_parameters(self._recurrent_layers),
            self.guard,
        ):
            output = self._training_step(batch)
            end_buffers = read_back()
        loss, _ = loss_of(output)
        self._has_loss = loss is not None
        self._replaced = []
        replaced = []
        for i, (end, start) in enumerate(zip(end_buffers, buffers, strict=True)):
            # One that was changed in place is a part of the stack, and needs no way out of the call.
            if end is not start:
                self._replaced.append(i)
                replaced.append(_same_shape(self.buffer_names[i], end, start))
        logged = self.recorder.take(parameters[0])
        if loss is None:
            return (*replaced, *logged)
        if self._open:
            names = self.layout.names
            named = dict(zip(names, parameters, strict=False))
            starts = dict(zip(names, islice(remaining, len(names)), strict=True))
            for i, state_names in zip(self._open, self._state_names, strict=True):
                state = dict(zip(state_names, islice(remaining, len(state_names)), strict=True))
                loss = loss + self.objectives[i].term(named, starts, state, self._watch)
        if self._watch is not None:
            # Its tensors belong to this call of `vmap`.
            self._watch.clear()
        return (as_scalar(loss), *replaced, *logged)

    def _training_step(self, batch: list[Tensor]) -> Any:
        """Call one client's ``training_step``, and record what objectives read of it."""
        arguments = self.host.arguments(batch, self._batch_index)
        if self._watch is None:
            return self.host.module.training_step(*arguments)
        with self._watch.watching(batch):
            self._watch.output = self.host.module.training_step(*arguments)
        return self._watch.output


class _Slot(NamedTuple):
    """An entry of a module's dicts that holds a tensor.

    Attributes:
        holder: One of the module's dicts.
        name: The key in it.
        number: The tensor's number among those that were looked for.
    """

    holder: dict[str, Any]
    name: str
    number: int


def _slots_of(module: nn.Module, kind: str, tensors: Sequence[Tensor]) -> list[_Slot]:
    """Find every entry that holds one of these tensors in a module's dicts.

    Args:
        module: The module.
        kind: The attribute that is the dict, ``"_parameters"`` or ``"_buffers"``.
        tensors: The tensors; tied ones have several entries.
    """
    number_of = {id(tensor): number for number, tensor in enumerate(tensors)}
    slots = []
    for submodule in module.modules():
        holder = getattr(submodule, kind)
        for name, tensor in holder.items():
            if tensor is not None and id(tensor) in number_of:
                slots.append(_Slot(holder, name, number_of[id(tensor)]))
    return slots


@contextmanager
def _substituted(slots: Sequence[_Slot], tensors: Sequence[Tensor]) -> Iterator[Callable[[], list[Tensor | None]]]:
    """Substitute tensors for the module's own inside the context.

    Yields:
        A function that reads the tensors back; ``None`` for one that was removed. Where a tied tensor was replaced in
        several of its slots, the last one counts.
    """
    originals = [holder[name] for holder, name, _ in slots]
    for holder, name, number in slots:
        holder[name] = tensors[number]

    def read_back() -> list[Tensor | None]:
        present: list[Tensor | None] = list(tensors)
        for holder, name, number in slots:
            if holder.get(name) is not tensors[number]:
                present[number] = holder.get(name)
        return present

    try:
        yield read_back
    finally:
        for (holder, name, _), tensor in zip(slots, originals, strict=True):
            holder[name] = tensor


def _same_shape(name: str, end: Tensor | None, start: Tensor) -> Tensor:
    """Return a buffer after the step, in the dtype that it had before.

    Raises:
        ValueError: If it is gone or has another shape than before.
    """
    if end is None or end.shape != start.shape:
        raise ValueError(f"buffer `{name}` of the shape {list(start.shape)} changes its shape")
    return end.detach().to(start.dtype)

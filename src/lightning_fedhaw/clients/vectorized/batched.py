"""``training_step`` of many clients as one batched call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_fedhaw.clients.steps import Host, Terms, loss_of
from lightning_fedhaw.clients.vectorized.guard import StepGuard
from lightning_fedhaw.clients.vectorized.recorder import StackRecorder
from lightning_fedhaw.objectives.base import ClientObjective, ClientState, Named
from lightning_fedhaw.vectors.layout import ParameterLayout


class StepInputs(NamedTuple):
    """What one batched call is given.

    Attributes:
        parameters: ``[rows, *shape]`` each, in the layout's order.
        buffers: ``[rows, *shape]`` each; changed in place where the step does so.
        batch: ``[rows, batch, ...]`` each.
        batch_index: The second argument of ``training_step``.
        starts: With client objectives: the models they started from, ``[rows, *shape]`` by name.
        states: With client objectives: the state of each, ``[rows, *shape]`` by name.
    """

    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor]
    batch: Sequence[Tensor]
    batch_index: int
    starts: Named | None = None
    states: Sequence[ClientState] = ()


class StepOutputs(NamedTuple):
    """What one batched call gives.

    Attributes:
        losses: ``[rows]``, or ``None`` if the step gave no loss.
        replaced: Buffers that were replaced rather than changed in place, by their number.
        logged: ``[rows]`` each.
    """

    losses: Tensor | None
    replaced: Mapping[int, Tensor]
    logged: Sequence[Tensor]


class Gradients(NamedTuple):
    """What one batched call gives, with the gradients of its losses.

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

    def buffers(self, before: Sequence[Tensor]) -> list[Tensor]:
        """Return the buffers after the call, of those that it was given."""
        after = list(before)
        for i, value in self.replaced.items():
            after[i] = value
        return after


class BatchedStep:
    """Call the user's ``training_step`` once for many clients, through one ``vmap``.

    Within the call the module's parameters and buffers are the clients': batched tensors, put into the dicts that hold
    them. Tied parameters stay tied.

    Args:
        host: The trainer around it.
        layout: The trainable parameters.
        objectives: What clients add to their loss.
        recorder: Receives what is logged.
        guard: Surrounds each client's step; its generators draw the clients' dropout masks.
        same_draws: Whether all clients are given the same other random numbers, instead of each its own.
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
        self._parameters = _places(module, "_parameters", layout.tensors(module))
        self._buffers = _places(module, "_buffers", list(layout.tracked_buffers(module).values()))
        # A closed objective brings its gradient itself; an open one is part of the loss.
        self._open = [i for i, objective in enumerate(objectives) if not objective.is_closed]
        self._batched = torch.func.vmap(self._one, randomness="same" if same_draws else "different")
        # `vmap` takes and gives tensors alone. What else the step of one client needs and tells stands here meanwhile.
        self._batch_index = 0
        self._counts = (0, 0, 0)
        self._state_names: list[list[str]] = []
        self._has_loss = True
        self._replaced: list[int] = []

    def __call__(self, inputs: StepInputs) -> StepOutputs:
        """Compute the clients' losses."""
        parameters, buffers, batch, self._batch_index, starts, states = inputs
        self._counts = (len(parameters), len(buffers), len(batch))
        extra = [torch.arange(len(parameters[0]))]
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
        return StepOutputs(losses, dict(zip(self._replaced, outputs[:count], strict=True)), outputs[count:])

    def gradients(self, trained: Sequence[int], inputs: StepInputs) -> Gradients:
        """Compute the losses, and each client's own gradient of its own loss.

        No row of the parameters is in another client's loss, so the gradient of the sum of all losses has each
        client's own gradient in its row.

        Args:
            trained: Which parameters, by their number.
            inputs: What the call is given.
        """
        losses, replaced, logged = self(inputs)
        if losses is None:
            return Gradients(None, [], replaced, logged)
        parameters = [inputs.parameters[i] for i in trained]
        gradients: Sequence[Tensor | None]
        gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        if inputs.starts is not None:
            named = dict(zip(self.layout.names, inputs.parameters, strict=True))
            terms = Terms(self.objectives, named, inputs.starts, inputs.states)
            gradients = terms.add_closed_gradients(gradients, parameters, torch.func.vmap)
        return Gradients(losses.detach(), gradients, replaced, [value.detach() for value in logged])

    def _one(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """Compute one client's step; every tensor lacks the leading axis that it has outside."""
        remaining = iter(flat)
        num_parameters, num_buffers, num_data = self._counts
        parameters = list(islice(remaining, num_parameters))
        buffers = list(islice(remaining, num_buffers))
        batch = list(islice(remaining, num_data))
        module = self.host.module
        self.guard.ticket = next(remaining)
        self.guard.trainable = frozenset(map(id, parameters))
        with (
            _in_place_of(self._parameters, parameters),
            _in_place_of(self._buffers, buffers) as read_back,
            self.guard,
        ):
            output = module.training_step(*self.host.arguments(batch, self._batch_index))
            after = read_back()
        loss, _ = loss_of(output)
        self._has_loss = loss is not None
        self._replaced = [i for i, (new, old) in enumerate(zip(after, buffers, strict=True)) if new is not old]
        replaced = [_same_shape(self.buffer_names[i], after[i], buffers[i]) for i in self._replaced]
        logged = self.recorder.take(parameters[0])
        if loss is None:
            return (*replaced, *logged)
        if self._open:
            names = self.layout.names
            named = dict(zip(names, parameters, strict=True))
            starts = dict(zip(names, islice(remaining, len(names)), strict=True))
            for i, state_names in zip(self._open, self._state_names, strict=True):
                state = dict(zip(state_names, islice(remaining, len(state_names)), strict=True))
                loss = loss + self.objectives[i].penalty(named, starts, state)
        return (loss.reshape(()), *replaced, *logged)


class _Place(NamedTuple):
    """Where a module holds a tensor.

    Attributes:
        holder: One of the module's dicts.
        name: The key there.
        number: The tensor's number among those that were asked for.
    """

    holder: dict[str, Any]
    name: str
    number: int


def _places(module: nn.Module, kind: str, tensors: Sequence[Tensor]) -> list[_Place]:
    """Find every place of these tensors in a module's dicts of the kind ``"_parameters"`` or ``"_buffers"``."""
    number_of = {id(tensor): i for i, tensor in enumerate(tensors)}
    places = []
    for submodule in module.modules():
        holder = getattr(submodule, kind)
        for name, tensor in holder.items():
            if tensor is not None and id(tensor) in number_of:
                places.append(_Place(holder, name, number_of[id(tensor)]))
    return places


@contextmanager
def _in_place_of(places: Sequence[_Place], tensors: Sequence[Tensor]) -> Iterator[Callable[[], list[Any]]]:
    """Put tensors in the module's places for a while.

    Yields:
        A function that reads the tensors back. Where a tied tensor was replaced in several of its places, the last
        one counts.
    """
    before = [holder[name] for holder, name, _ in places]
    for holder, name, i in places:
        holder[name] = tensors[i]

    def read_back() -> list[Any]:
        after: list[Any] = list(tensors)
        for holder, name, i in places:
            if holder.get(name) is not tensors[i]:
                after[i] = holder.get(name)
        return after

    try:
        yield read_back
    finally:
        for (holder, name, _), tensor in zip(places, before, strict=True):
            holder[name] = tensor


def _same_shape(name: str, ended: Any, started: Tensor) -> Tensor:
    if ended is None or ended.shape != started.shape:
        raise ValueError(f"buffer `{name}` of the shape {list(started.shape)} changes its shape")
    return ended.detach().to(started.dtype)  # type: ignore[no-any-return]

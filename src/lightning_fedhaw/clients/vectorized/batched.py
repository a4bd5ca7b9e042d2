"""``training_step`` of many clients as one batched call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_fedhaw.clients.records import NotAFunctionError, StackRecorder
from lightning_fedhaw.clients.steps import Host, Terms, loss_of
from lightning_fedhaw.objectives.base import ClientObjective, ClientState, Named
from lightning_fedhaw.vectors.layout import ParameterLayout

Arguments = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], int, Named | None, Sequence[ClientState]]
"""Parameters, buffers, batch, its number, starts and states of client objectives."""


class Gradients(NamedTuple):
    """What one batched call gives.

    Attributes:
        losses: ``[rows]``, or ``None`` if the step gave no loss.
        gradients: ``[rows, *shape]`` each; ``None`` for a parameter that was not used.
        replaced: Buffers that were replaced rather than changed in place, by their number.
        logged: ``[rows]`` each.
    """

    losses: Tensor | None
    gradients: Sequence[Tensor | None]
    replaced: Sequence[tuple[int, Tensor]]
    logged: Sequence[Tensor]

    def buffers(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The buffers after the call, of those that it was given."""
        after = list(given)
        for i, value in self.replaced:
            after[i] = value
        return after


class BatchedStep:
    """Calls the user's ``training_step`` once for many clients, through one ``vmap``.

    Within the call the module's parameters and buffers are the clients': batched tensors, put into the dicts that hold
    them. Tied parameters stay tied.

    Args:
        host: The trainer around it.
        layout: The trainable parameters.
        objectives: What clients add to their loss.
        recorder: Takes what is logged.
        dropout: Draws the clients' dropout masks, where the step asks for some.
        same_draws: Whether all clients are given the same other random numbers, instead of each its own.
    """

    def __init__(
        self,
        host: Host,
        layout: ParameterLayout,
        objectives: Sequence[ClientObjective],
        recorder: StackRecorder,
        dropout: ClientDropout | None = None,
        same_draws: bool = False,
    ) -> None:
        self.host, self.layout, self.objectives = host, layout, objectives
        self._open = [i for i, objective in enumerate(objectives) if not objective.is_closed]
        self.recorder, self.dropout = recorder, dropout
        module = host.module
        self.buffer_names = layout.buffers
        self._parameters = _places(module, "_parameters", layout.tensors(module))
        self._buffers = _places(module, "_buffers", list(layout.moving_buffers(module).values()))
        self._batched = torch.func.vmap(self._one, randomness="same" if same_draws else "different")
        self._batch_index = 0
        self._replaced: list[int] = []
        self._has_loss = True
        self._counts = (0, 0, 0)
        self._state_names: list[list[str]] = []

    def __call__(
        self,
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
        data: Sequence[Tensor],
        batch_index: int,
        starts: Named | None = None,
        states: Sequence[ClientState] = (),
    ) -> tuple[Tensor | None, list[tuple[int, Tensor]], Sequence[Tensor]]:
        """The clients' losses.

        Args:
            parameters: ``[rows, *shape]`` each, in the layout's order.
            buffers: ``[rows, *shape]`` each; changed in place where the step does so.
            data: The batch, ``[rows, batch, ...]`` each.
            batch_index: The second argument of ``training_step``.
            starts: With client objectives: the models they started from, ``[rows, *shape]`` by name.
            states: With client objectives: the state of each, ``[rows, *shape]`` by name.

        Returns:
            ``[rows]`` losses, or ``None`` if the step gave none; buffers that were replaced, by their number; and what
            was logged, ``[rows]`` each.
        """
        self._batch_index = batch_index
        self._counts = (len(parameters), len(buffers), len(data))
        extra: list[Tensor] = [] if self.dropout is None else [torch.arange(len(parameters[0]))]
        if self._open and starts is not None:
            self._state_names = [list(states[i]) for i in self._open]
            extra += [*starts.values(), *(value for i in self._open for value in states[i].values())]
        with self.host.step_context():
            given = self._batched(*parameters, *buffers, *data, *extra)
        loss = given[0] if self._has_loss else None
        rest = given[1:] if self._has_loss else given
        replaced = list(zip(self._replaced, rest, strict=False))
        return loss, replaced, rest[len(replaced) :]

    def gradients(self, trained: Sequence[int], call: Arguments) -> Gradients:
        """The losses, and each client's own gradient of its own loss: the sum of all has them in its rows.

        Args:
            trained: Which parameters, by their number.
            call: What :meth:`__call__` takes.
        """
        losses, replaced, logged = self(*call)
        if losses is None:
            return Gradients(None, [], replaced, logged)
        found: Sequence[Tensor | None]
        found = torch.autograd.grad(losses.sum(), [call[0][i] for i in trained], allow_unused=True)
        parameters, _, _, _, starts, states = call
        if starts is not None:
            terms = Terms(self.objectives, dict(zip(self.layout.names, parameters, strict=True)), starts, states)
            found = terms.steepened(found, [parameters[i] for i in trained], torch.func.vmap)
        return Gradients(losses.detach(), found, replaced, [value.detach() for value in logged])

    def _one(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """One client's step; every tensor lacks the leading axis that it has outside."""
        given = iter(flat)
        parameters, buffers, data = ([next(given) for _ in range(count)] for count in self._counts)
        module = self.host.module
        if self.dropout is not None:
            self.dropout.ticket = next(given)
        with (
            _in_place_of(self._parameters, parameters),
            _in_place_of(self._buffers, buffers) as now,
            self.dropout or nullcontext(),
        ):
            output = module.training_step(*self.host.arguments(data, self._batch_index))
            after = now()
        loss, _ = loss_of(output)
        self._has_loss = loss is not None
        self._replaced = [i for i, (new, old) in enumerate(zip(after, buffers, strict=True)) if new is not old]
        replaced = [_same_shape(self.buffer_names[i], after[i], buffers[i]) for i in self._replaced]
        logged = self.recorder.take(parameters[0])
        if loss is None:
            return (*replaced, *logged)
        if self._open:
            starts = {name: next(given) for name in self.layout.names}
            named = dict(zip(self.layout.names, parameters, strict=True))
            for i, names in zip(self._open, self._state_names, strict=True):
                loss = loss + self.objectives[i].penalty(named, starts, {name: next(given) for name in names})
        return (loss.reshape(()), *replaced, *logged)


Place = tuple[dict[str, Any], str, int]


def _places(module: nn.Module, holder: str, tensors: Sequence[Tensor]) -> list[Place]:
    """Every entry of a module's dicts that holds one of these tensors, with the tensor's number."""
    number = {id(tensor): i for i, tensor in enumerate(tensors)}
    return [
        (own, name, number[id(tensor)])
        for each in module.modules()
        for own in [getattr(each, holder)]
        for name, tensor in own.items()
        if tensor is not None and id(tensor) in number
    ]


@contextmanager
def _in_place_of(places: Sequence[Place], tensors: Sequence[Tensor]) -> Iterator[Callable[[], list[Any]]]:
    """Put tensors in the module's places; gives a function that reads them back, last place of a tensor first."""
    before = [own[name] for own, name, _ in places]
    for own, name, i in places:
        own[name] = tensors[i]

    def now() -> list[Any]:
        found: list[Any] = list(tensors)
        for own, name, i in places:
            if own.get(name) is not tensors[i]:
                found[i] = own.get(name)
        return found

    try:
        yield now
    finally:
        for (own, name, _), tensor in zip(places, before, strict=True):
            own[name] = tensor


def _same_shape(name: str, ended: Any, started: Tensor) -> Tensor:
    if ended is None or ended.shape != started.shape:
        raise ValueError(f"buffer `{name}` of the shape {list(started.shape)} changes its shape")
    return ended.detach().to(started.dtype)  # type: ignore[no-any-return]


class EmbeddingGuard(TorchFunctionMode):
    """Refuses embeddings that a batched call silently gets wrong."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.nn.functional.embedding, torch.nn.functional.embedding_bag):
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            for option in ("padding_idx", "max_norm"):
                if given.get(option) is not None:
                    # Batched rules number the rows of all clients together, so the one that is meant is not found; and
                    # a norm is bounded in place.
                    raise NotAFunctionError(f"looks up an embedding with `{option}`, which a batched call gets wrong")
        return func(*args, **kwargs)


class ClientDropout(TorchFunctionMode):
    """Gives each client of a batched call the dropout masks that it would draw if it trained alone on the CPU.

    Outside of a batched call it gives the one client there is the same masks, on any device.

    Attributes:
        generators: One for each client of the call at hand.
        calls: How often dropout was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generators: Sequence[torch.Generator] = ()
        self.ticket: Tensor | None = None
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.dropout:
            return self._dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0 or not input.numel():
            return input
        self.calls += 1
        if p == 1:
            return input.mul_(0) if inplace else input * 0
        drawn = list(self.generators), tuple(input.shape), input.dtype, input.device, p
        mask = _draw_masks(*drawn)[0] if self.ticket is None else _Masks.apply(self.ticket, *drawn)
        return input.mul_(mask) if inplace else input * mask


class _Masks(torch.autograd.Function):
    """``[*shape]`` of one client inside a batched call; outside, one mask per generator.

    On a GPU that is one launch for each client and layer. One generator for all rows would need one launch, but a
    client's masks would then depend on who else is in its chunk, and so on the number of processes; and masks hashed
    from a counter would not be those that ``F.dropout`` draws for a client that trains alone.
    """

    @staticmethod
    def forward(ticket: Tensor, *_: Any) -> Tensor:
        raise AssertionError("dropout masks are drawn inside a batched call")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing flows back to a mask."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        ticket: Tensor,
        generators: Sequence[torch.Generator],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        p: float,
    ) -> tuple[Tensor, int]:
        return _draw_masks(generators, shape, dtype, device, p), 0


def _draw_masks(
    generators: Sequence[torch.Generator], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, p: float
) -> Tensor:
    """One dropout mask ``[*shape]`` for each generator."""
    masks = torch.empty((len(generators), *shape), dtype=dtype, device=device)
    for mask, generator in zip(masks, generators, strict=True):
        mask.bernoulli_(1 - p, generator=generator)
    return masks.div_(1 - p)

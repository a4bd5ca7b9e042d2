"""What a batched call would get wrong: dropout masks, embeddings, and whether a parameter is trainable."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError


class StepGuard(TorchFunctionMode):
    """Surround one client's step, in a batched call or alone.

    Each client is given the dropout masks that it would draw if it trained alone on the CPU, also outside of a batched
    call and on any device. Embeddings that batching silently gets wrong are refused. The clients' parameters say that
    they are trainable, which no tensor says inside of a batched call.

    Attributes:
        generators: Gives a generator for each client of the current call.
        ticket: Inside a batched call, a batched tensor, by which the clients' masks become batched too.
        trainable: The numbers (``id``) of the clients' parameters in the current call.
        calls: How often dropout was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generators: Callable[[], Sequence[torch.Generator]] = tuple
        self.ticket: Tensor | None = None
        self.trainable: frozenset[int] = frozenset()
        self.calls = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _GUARDED:
            return getattr(self, _GUARDED[func])(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _requires_grad(self, tensor: Tensor) -> bool:
        return id(tensor) in self.trainable or tensor.requires_grad

    def _embedding(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._looked_up(functional.embedding, args, kwargs)

    def _embedding_bag(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._looked_up(functional.embedding_bag, args, kwargs)

    def _looked_up(self, function: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        for option in ("padding_idx", "max_norm"):
            # Batching numbers the rows of all clients together, so the one that is meant is not found; and a norm is
            # bounded in place.
            if self.ticket is not None and arguments.get(option) is not None:
                raise NotVectorizableError(f"looks up an embedding with `{option}`, which a batched call gets wrong")
        return function(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0 or not input.numel():
            return input
        self.calls += 1
        if p == 1:
            return input.mul_(0) if inplace else input * 0
        draw = _Draw(self.generators(), tuple(input.shape), input.dtype, input.device, p)
        mask = draw.masks()[0] if self.ticket is None else _BatchedMasks.apply(self.ticket, draw)
        return input.mul_(mask) if inplace else input * mask


_GUARDED: dict[Any, str] = {
    functional.dropout: "_dropout",
    functional.embedding: "_embedding",
    functional.embedding_bag: "_embedding_bag",
    Tensor.requires_grad.__get__: "_requires_grad",  # type: ignore[attr-defined]
}
"""Functions that the guard answers for, and its methods that do."""


class _Draw(NamedTuple):
    """Dropout masks that are to be drawn.

    Attributes:
        generators: One for each client.
        shape: The shape of one client's mask.
        dtype: Its dtype.
        device: Its device.
        p: The probability of a zero.
    """

    generators: Sequence[torch.Generator]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    p: float

    def masks(self) -> Tensor:
        """Draw ``[clients, *shape]``."""
        masks = torch.empty((len(self.generators), *self.shape), dtype=self.dtype, device=self.device)
        for mask, generator in zip(masks, self.generators, strict=True):
            mask.bernoulli_(1 - self.p, generator=generator)
        return masks.div_(1 - self.p)


class _BatchedMasks(torch.autograd.Function):
    """Draw one client's mask ``[*shape]`` inside a batched call, which is a stack of all clients' masks outside of it.

    On a GPU that is one launch for each client and layer. One generator for all rows would need one launch, but a
    client's masks would then depend on who else is in its chunk, and so on the number of processes; and masks hashed
    from a counter would not be those that ``F.dropout`` draws for a client that trains alone.
    """

    @staticmethod
    def forward(ticket: Tensor, draw: _Draw) -> Tensor:
        raise AssertionError("dropout masks are drawn inside a batched call")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: no gradient flows back to a mask."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, ticket: Tensor, draw: _Draw) -> tuple[Tensor, int]:
        return draw.masks(), 0

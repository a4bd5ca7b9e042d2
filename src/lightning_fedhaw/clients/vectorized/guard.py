"""Corrections to a batched call: dropout masks, embeddings, recurrent layers, and whether a parameter is trainable."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_fedhaw.clients.vectorized.errors import NotVectorizableError
from lightning_fedhaw.clients.vectorized.recurrent import CELLS, run_layers
from lightning_fedhaw.clients.vectorized.weighted import MEANS, Counted


class StepGuard(TorchFunctionMode):
    """A context for one client's step, in a batched call or alone.

    Each client is given the dropout masks that it would draw if it trained alone on the CPU, also outside of a batched
    call and on any device. Recurrent layers are computed step by step, because their kernels cannot be batched.
    Embedding options that batching silently gets wrong are refused. The clients' parameters say that they require
    gradients, which no tensor says inside of a batched call. Where only the first samples of a batch count, means over
    the batch are means over these.

    Attributes:
        generators: Returns a generator for each client of the current call.
        ticket: Inside a batched call, any batched tensor, which makes the clients' masks batched, too; else ``None``.
        trainable: The identities (``id``) of the clients' parameters in the current call.
        counted: Inside a batched call with batches of different lengths, the samples that count.
        calls: The number of dropout calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generators: Callable[[], Sequence[torch.Generator]] = tuple
        self.ticket: Tensor | None = None
        self.trainable: frozenset[int] = frozenset()
        self.counted: Counted | None = None
        self.calls = 0

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        # Its memory is that of a batch, which must be free before the next one is made.
        self.ticket = None
        self.counted = None

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if func in _GUARDED:
            func = getattr(self, _GUARDED[func])
        elif self.counted is not None and func in MEANS:
            return self.counted.call(func, args, kwargs or {})
        elif func in CELLS:
            func = partial(self._recurrent, func)
        return func(*args, **(kwargs or {}))

    def _requires_grad(self, tensor: Tensor) -> bool:
        return id(tensor) in self.trainable or tensor.requires_grad

    def _embedding(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._look_up(functional.embedding, args, kwargs)

    def _embedding_bag(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._look_up(functional.embedding_bag, args, kwargs)

    def _look_up(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Look up an embedding.

        Raises:
            NotVectorizableError: If an option is used that a batched call gets wrong.
        """
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        for option in ("padding_idx", "max_norm"):
            # Batching numbers the rows of all clients' tables consecutively, so that `padding_idx` is a row of the
            # first client; and `max_norm` changes the table in place.
            if self.ticket is not None and arguments.get(option) is not None:
                raise NotVectorizableError(f"looks up an embedding with `{option}`, which a batched call gets wrong")
        return function(*args, **kwargs)

    def _recurrent(self, kernel: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
        """Run recurrent layers; the arguments are those of the kernel.

        Raises:
            NotVectorizableError: For packed sequences in a batched call.
        """
        # For packed sequences the kernels take the sizes of the batches, too, and what follows comes one place later.
        is_packed = not isinstance(args[3], bool)
        if self.ticket is None and (is_packed or not _drops_between_layers(*args[4:7])):
            outputs: tuple[Tensor, ...] = kernel(*args)
            return outputs
        if is_packed:
            raise NotVectorizableError("packs sequences, whose lengths would have to be the same for all clients")
        return run_layers(CELLS[kernel], self._dropout, *args)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Drop elements by a mask of the client's own generator; the arguments are those of ``F.dropout``."""
        if not training or p == 0 or not input.numel():
            return input
        self.calls += 1
        multiply = Tensor.mul_ if inplace else Tensor.mul
        if p == 1:
            # No mask is drawn, as in `F.dropout`.
            return multiply(input, 0)
        draw = _Draw(self.generators(), tuple(input.shape), input.dtype, input.device, p)
        if self.ticket is None:
            return multiply(input, draw.masks()[0])
        # Without its history: the step may differentiate with respect to its batch.
        return multiply(input, _BatchedMasks.apply(self.ticket.detach(), draw))


def _drops_between_layers(num_layers: int, p: float, training: bool) -> bool:
    return num_layers > 1 and training and p > 0


_GUARDED: dict[Any, str] = {
    functional.dropout: "_dropout",
    functional.embedding: "_embedding",
    functional.embedding_bag: "_embedding_bag",
    Tensor.requires_grad.__get__: "_requires_grad",  # type: ignore[attr-defined]
}
"""The functions that the guard replaces, and the names of the methods that replace them."""


class _Draw(NamedTuple):
    """The description of dropout masks that are to be drawn.

    Attributes:
        generators: One generator for each client.
        shape: The shape of one client's mask.
        dtype: The dtype of the mask.
        device: The device of the mask.
        p: The probability of a zero.
    """

    generators: Sequence[torch.Generator]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    p: float

    def masks(self) -> Tensor:
        """Draw the masks ``[clients, *shape]``, whose elements are 0 or 1 / (1 - p)."""
        masks = torch.empty((len(self.generators), *self.shape), dtype=self.dtype, device=self.device)
        for mask, generator in zip(masks, self.generators, strict=True):
            mask.bernoulli_(1 - self.p, generator=generator)
        return masks.div_(1 - self.p)


class _BatchedMasks(torch.autograd.Function):
    """One client's mask ``[*shape]`` inside a batched call, which is a stack of all clients' masks outside of it.

    On a GPU that is one launch for each client and layer. One generator for all rows would need a single launch, but a
    client's masks would then depend on the other clients in its chunk, and so on the number of processes. Masks hashed
    from a counter would not be those that ``F.dropout`` draws for a client that trains alone.
    """

    @staticmethod
    def forward(ticket: Tensor, draw: _Draw) -> Tensor:
        """Refuse a call outside of ``vmap``, whose rule below is used instead."""
        raise AssertionError("dropout masks are drawn inside a batched call")

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        """Save nothing: no gradient flows back to a mask."""

    @staticmethod
    def vmap(info: object, in_dims: object, ticket: Tensor, draw: _Draw) -> tuple[Tensor, int]:
        """Draw the stack of masks, whose axis of clients is the first."""
        return draw.masks(), 0


class NoLogger:
    """A substitute for the logger during the trial, which refuses calls: there would be one for all clients."""

    def __getattr__(self, name: str) -> object:
        raise NotVectorizableError(
            f"calls the logger itself (`{name}`), once for all clients at once; `self.log` is called for each"
        )

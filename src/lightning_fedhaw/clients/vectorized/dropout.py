"""Dropout in a batched call: each client is given the masks that it would draw if it trained alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ClientDropout(TorchFunctionMode):
    """Give each client of a batched call the dropout masks that it would draw if it trained alone on the CPU.

    Outside of a batched call it gives the one client there is the same masks, on any device.

    Attributes:
        generators: One for each client of the current call.
        ticket: Inside a batched call, a batched tensor, by which the clients' masks become batched too.
        calls: How often dropout was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generators: Sequence[torch.Generator] = ()
        self.ticket: Tensor | None = None
        self.calls = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
        draw = _Draw(list(self.generators), tuple(input.shape), input.dtype, input.device, p)
        mask = draw.masks()[0] if self.ticket is None else _BatchedMasks.apply(self.ticket, draw)
        return input.mul_(mask) if inplace else input * mask


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

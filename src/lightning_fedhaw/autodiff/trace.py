"""What a federated program and its derivative cost, found by running the program on tensors without values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Message:
    """One broadcast or one sum.

    Attributes:
        numbers: Numbers that each client receives or sends.
        is_differentiated: Whether they depend on what the derivative is taken in.
        sources: Of a sum, the sizes of the broadcast values that it depends on.
    """

    numbers: int
    is_differentiated: bool
    sources: tuple[int, ...] = ()


@dataclass
class Trace:
    """The messages of a program, in order.

    Attributes:
        broadcasts: From the server to the clients.
        sums: From the clients to the server.
        sums_only: Whether the server reads nothing but sums over clients.
        tape: Numbers that a client keeps for a reverse pass over its part of the program.
    """

    broadcasts: list[Message] = field(default_factory=list)
    sums: list[Message] = field(default_factory=list)
    sums_only: bool = True
    tape: int = 0

    def add_broadcast(self, value: Tensor) -> None:
        """Note a broadcast."""
        self.broadcasts.append(Message(value.numel(), value.requires_grad))

    def add_sum(self, message: Tensor, sources: Sequence[Tensor]) -> None:
        """Note a sum over clients."""
        sizes = tuple(source.numel() for source in sources)
        self.sums.append(Message(message.numel(), bool(sources), sizes))

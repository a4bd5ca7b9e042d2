"""Messages of which only some numbers are sent, with the rest kept for next time.

S. U. Stich, J.-B. Cordonnier, M. Jaggi: Sparsified SGD with Memory. NeurIPS 2018.
"""

from __future__ import annotations

from math import ceil, log2
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.channel.base import BlockChannel, MessageSize, Per

Choice = Literal["top", "random"]


def number_kept(fraction: float, length: int) -> int:
    """How many numbers of a block are sent: at least one."""
    return max(1, ceil(fraction * length - 1e-9))


def sparsify(vector: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """A vector ``[d]`` with all but some of its numbers zero.

    Args:
        vector: ``[d]``.
        count: How many stay.
        generator: For a random choice; the largest in size without.
    """
    if generator is None:
        chosen = vector.abs().topk(count, sorted=False).indices
    else:
        chosen = torch.randperm(len(vector), generator=generator)[:count].to(vector.device)
    return torch.zeros_like(vector).index_copy_(0, chosen, vector[chosen])


class SparsificationChannel(BlockChannel):
    """Sends a part of the update's numbers.

    Args:
        fraction: The part, in (0, 1]; 1 sends everything.
        choice: ``"top"``: the largest in size. ``"random"``: any.
        error_feedback: Whether a client keeps what it did not send, and adds it to its next update. Kept in host
            memory, of clients whose update was received; a client that failed keeps what it had. Without it, random
            choices are divided by the fraction, so that the mean is right.
        per: Whether the numbers are chosen from the whole update or from each layer.
        name: As in :class:`Channel`. The channel is for the uplink.

    Raises:
        ValueError: If an argument is out of range.
    """

    key = "SparsifiedChannel"

    _held: dict[int, Tensor]
    _next: Tensor | None

    def __init__(
        self,
        fraction: float,
        choice: Choice = "top",
        *,
        error_feedback: bool = True,
        per: Per = "update",
        name: str | None = None,
    ) -> None:
        super().__init__(per, name=name)
        self.fraction = arguments.number("fraction", fraction, above=0, maximum=1, hint="0.01 sends a hundredth.")
        self.choice = arguments.choice("choice", choice, Choice)
        self.error_feedback = arguments.flag("error_feedback", error_feedback)
        self.reset()

    @property
    def remembers(self) -> bool:
        """Whether there is error feedback."""
        return self.error_feedback and self.fraction < 1

    def encode(self, size: MessageSize) -> MessageSize:
        """What is sent, and where it belongs: positions, a bit for each number if that is less, or a random seed."""
        if self.fraction == 1:
            return size
        lengths = [block.stop - block.start for block in self.blocks]
        kept = min(sum(number_kept(self.fraction, length) for length in lengths), size.values)
        positions = 64 if self.choice == "random" else min(kept * ceil(log2(max(lengths))), sum(lengths))
        return MessageSize(kept, size.bits, size.side + positions)

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """The numbers that are sent; see :meth:`Channel.transmit`."""
        if self.fraction == 1:
            return message
        generator = self.stream(seed, round_idx, client, "choice") if self.choice == "random" else None
        held = self._held.get(client)
        whole = message if held is None else message + held.to(message)
        sent = self.blockwise(lambda block: self._chosen(block, generator), whole)
        if self.error_feedback:
            self._next = whole - sent
        return sent

    def _chosen(self, block: Tensor, generator: torch.Generator | None) -> Tensor:
        count = number_kept(self.fraction, len(block))
        chosen = sparsify(block, count, generator)
        return chosen if self.error_feedback or generator is None else chosen.mul_(len(block) / count)

    def remember(self, client: int, start: Tensor, displacement: Tensor, num_steps: int) -> None:
        """The update was received: what was left out of it waits for the next."""
        super().remember(client, start, displacement, num_steps)
        if self._next is not None:
            self._held = {**self._held, client: self._next.cpu()}
            self._next = None

    def reset(self) -> None:
        """Forget what another run left behind."""
        super().reset()
        self._held, self._next = {}, None

    def state_dict(self) -> dict[str, Any]:
        """What clients hold back, for a checkpoint."""
        return {**super().state_dict(), "held": dict(self._held)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what clients hold back from a checkpoint."""
        super().load_state_dict(state_dict)
        self._held = dict(state_dict.get("held", {}))

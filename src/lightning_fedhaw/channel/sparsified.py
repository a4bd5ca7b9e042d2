"""Sparsification: only some numbers of an update are sent, and error feedback keeps the others for later.

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
    """Return how many numbers of a block are sent: at least one.

    Args:
        fraction: The share of the numbers that is sent.
        length: The number of numbers in the block.
    """
    # The tolerance keeps rounding errors from adding one: 0.07 * 100 is 7.000000000000001 in float64.
    return max(1, ceil(fraction * length - 1e-9))


def sparsify(vector: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Set all but some numbers of a vector to zero.

    Args:
        vector: ``[d]``.
        count: The number of numbers that stay.
        generator: The source of the draws for a random selection. Without it the largest magnitudes are selected.

    Returns:
        ``[d]``, a new vector.
    """
    if generator is None:
        positions = vector.abs().topk(count, sorted=False).indices
    else:
        # Drawn on the CPU, so that one seed selects the same numbers on every device.
        positions = torch.randperm(len(vector), generator=generator)[:count].to(vector.device)
    return torch.zeros_like(vector).index_copy_(0, positions, vector[positions])


class SparsificationChannel(BlockChannel):
    """A channel that sends only a fraction of the numbers of an update.

    Args:
        fraction: The share of the numbers that is sent, in (0, 1]; 1 sends all.
        choice: ``"top"``: the largest magnitudes. ``"random"``: a random selection.
        error_feedback: Whether a client keeps the numbers that it did not send, and adds them to its next update. They
            are kept in host memory once its update has been received; a client whose update is lost keeps the earlier
            ones. Without error feedback a random selection is divided by the fraction, which makes it unbiased.
        per: Whether the numbers are selected from the whole update or from each layer.
        name: As in :class:`Channel`. The channel is always on the uplink.

    Raises:
        ValueError: If an argument is out of range.
    """

    key = "SparsifiedChannel"

    _residuals: dict[int, Tensor]
    _pending_residual: Tensor | None

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
        """Whether there is error feedback, so that messages depend on earlier ones."""
        return self.error_feedback and self.fraction < 1

    def encode(self, size: MessageSize) -> MessageSize:
        """Return the size of the numbers that are sent and of their positions.

        Positions are sent as indices within a block or as one bit for each number, whichever is shorter. Those of a
        random selection follow from a seed of 64 bits.
        """
        if self.fraction == 1:
            return size
        lengths = [block.stop - block.start for block in self.blocks]
        selected = sum(number_kept(self.fraction, length) for length in lengths)
        # A sparsification before this one may have left fewer numbers.
        values = min(selected, size.values)
        if self.choice == "random":
            position_bits = 64
        else:
            # An index must be able to name every position of the longest block.
            index_bits = values * ceil(log2(max(lengths)))
            mask_bits = sum(lengths)
            position_bits = min(index_bits, mask_bits)
        return MessageSize(values, size.bits, size.side + position_bits)

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """Return the update with the numbers that are not sent set to zero; see :meth:`Channel.transmit`."""
        if self.fraction == 1:
            return message
        generator: torch.Generator | None = None
        if self.choice == "random":
            generator = self.stream(seed, round_idx, client, "choice")
        update = message
        residual = self._residuals.get(client)
        if residual is not None:
            update = message + residual.to(message)
        sent = self.blockwise(lambda block: self._selected(block, generator), update)
        if self.error_feedback:
            # Not yet the client's residual: the update may still be lost, by a channel after this one or as non-finite.
            self._pending_residual = update - sent
        return sent

    def _selected(self, block: Tensor, generator: torch.Generator | None) -> Tensor:
        count = number_kept(self.fraction, len(block))
        selected = sparsify(block, count, generator)
        if self.choice == "random" and not self.error_feedback:
            # The expectation over the choices is then the block. With error feedback the rest is sent later instead.
            selected.mul_(len(block) / count)
        return selected

    def remember(self, client: int, start: Tensor, displacement: Tensor, num_steps: int) -> None:
        """Keep the residual of a client whose update was received; see :meth:`Channel.remember`."""
        super().remember(client, start, displacement, num_steps)
        if self._pending_residual is not None:
            # A new dictionary, so that an interrupted round can restore the old one.
            self._residuals = {**self._residuals, client: self._pending_residual.cpu()}
            self._pending_residual = None

    def reset(self) -> None:
        """Forget the residuals of an earlier run."""
        super().reset()
        self._residuals = {}
        self._pending_residual = None

    def state_dict(self) -> dict[str, Any]:
        """Return the clients' residuals, for a checkpoint."""
        return {**super().state_dict(), "held": dict(self._residuals)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clients' residuals from a checkpoint."""
        super().load_state_dict(state_dict)
        self._residuals = dict(state_dict.get("held", {}))

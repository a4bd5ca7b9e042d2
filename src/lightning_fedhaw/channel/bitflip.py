"""Bits that are received as their opposite: a binary symmetric channel without error correction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.channel.base import Channel, MessageSize
from lightning_fedhaw.channel.quantized import check_bits, through_codes


def flips(count: int, rate: float, generator: torch.Generator) -> Tensor:
    """Which of many bits are flipped, each independently: their positions, int64, in ascending order.

    Gaps between the events of a Bernoulli process are geometric, so the work is in proportion to the flips.
    """
    if rate <= 0 or count == 0:
        return torch.zeros(0, dtype=torch.int64)
    if rate >= 1:
        return torch.arange(count)
    found, last = [], -1.0
    while last < count:
        many = int((count - last) * rate * 1.1) + 16
        gaps = torch.empty(many, dtype=torch.float64).geometric_(rate, generator=generator)
        found.append(last + gaps.cumsum(0))
        last = float(found[-1][-1])
    positions = torch.cat(found)
    return positions[positions < count].long()


def flip(words: Tensor, bits: int, rate: float, generator: torch.Generator) -> Tensor:
    """Integers ``[d]`` with each of their lowest ``bits`` bits flipped with a probability."""
    positions = flips(words.numel() * bits, rate, generator).to(words.device)
    masks = torch.zeros(words.shape, dtype=torch.int64, device=words.device)
    one = torch.ones((), dtype=torch.int64, device=words.device)
    # No position comes twice, so adding is setting.
    masks.index_add_(0, positions // bits, torch.bitwise_left_shift(one, positions % bits))
    return words ^ masks.to(words.dtype)


class BitFlipChannel(Channel):
    """Flips each bit of a message with a probability.

    A flipped exponent makes a number huge, infinite or NaN. Messages with infinity or NaN are treated as any client's
    that diverged (``on_nonfinite=``); the others go into the sum, however huge, which is what a link without error
    detection does. With ``bits`` numbers stay within the message's range.

    Args:
        rate: Bit error rate.
        bits: 32: the bits of the floating-point words. 1 to 16: the bits of the codes of a uniform quantization to the
            nearest, whose range arrives without a fault.
        channel: The arguments of :class:`Channel`. On the downlink the message is the model.

    Raises:
        ValueError: If an argument is out of range.
    """

    key = "BitFlipChannel"

    def __init__(self, rate: float, bits: int = 32, **channel: Any) -> None:
        arguments.check_names(type(self).__name__, channel, arguments.constructor_names(type(self)))
        super().__init__(**channel)
        self.rate = arguments.probability("rate", rate)
        self.bits = check_bits(bits)

    def encode(self, size: MessageSize) -> MessageSize:
        """As many bits a number as the codes have, and their range."""
        return size if self.bits == 32 or not self.rate else MessageSize(size.values, self.bits, size.side + 64)

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """The message with flipped bits; see :meth:`Channel.transmit`."""
        if not self.rate:
            return message
        generator = self.stream(seed, round_idx, client, "flips")
        return self.on_sent(lambda sent: self._flipped(sent, generator), message)

    def _flipped(self, sent: Tensor, generator: torch.Generator) -> Tensor:
        if self.bits == 32:
            words = sent.view(torch.int64 if sent.dtype == torch.float64 else torch.int32)
            return flip(words, 8 * sent.element_size(), self.rate, generator).view(sent.dtype)
        return through_codes(sent, self.bits, change=lambda codes: flip(codes, self.bits, self.rate, generator))

"""Bit errors: a binary symmetric channel without error correction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.channel.base import Channel, MessageSize
from lightning_fedhaw.channel.quantized import check_bits, through_codes


def flips(count: int, rate: float, generator: torch.Generator) -> Tensor:
    """Draw the positions of flipped bits, each bit being flipped independently.

    The gaps between the events of a Bernoulli process are geometric, so that the work is proportional to the number of
    flips instead of the number of bits.

    Args:
        count: The number of bits.
        rate: The probability of a flip.
        generator: The source of the draws.

    Returns:
        The positions, int64, in ascending order.
    """
    if rate <= 0 or count == 0:
        return torch.zeros(0, dtype=torch.int64)
    if rate >= 1:
        return torch.arange(count)
    batches = []
    end = -1.0
    while end < count:
        # A tenth more than expected, so that one batch nearly always reaches the last bit.
        batch_size = int((count - end) * rate * 1.1) + 16
        # Float64 holds positions exactly up to 2^53.
        gaps = torch.empty(batch_size, dtype=torch.float64).geometric_(rate, generator=generator)
        positions = end + gaps.cumsum(0)
        batches.append(positions)
        end = float(positions[-1])
    positions = torch.cat(batches)
    return positions[positions < count].long()


def flip(words: Tensor, bits: int, rate: float, generator: torch.Generator) -> Tensor:
    """Flip each of the lowest bits of integers with a probability.

    Args:
        words: ``[d]``, integers.
        bits: The number of bits of each word that may be flipped.
        rate: The probability of a flip.
        generator: The source of the draws.

    Returns:
        ``[d]``, new integers of the same dtype.
    """
    positions = flips(words.numel() * bits, rate, generator).to(words.device)
    masks = torch.zeros(words.shape, dtype=torch.int64, device=words.device)
    lowest_bit = torch.ones((), dtype=torch.int64, device=words.device)
    # Positions are distinct, so adding a power of two sets a bit.
    masks.index_add_(0, positions // bits, torch.bitwise_left_shift(lowest_bit, positions % bits))
    return words ^ masks.to(words.dtype)


class BitFlipChannel(Channel):
    """A channel that flips each bit of a message with a probability.

    A flipped exponent makes a number huge, infinite or NaN. A message with infinity or NaN is treated as that of a
    diverged client (``on_nonfinite=``); all others are aggregated, however large, as on a link without error detection.
    With ``bits`` from 1 to 16, numbers stay within the message's range.

    Args:
        rate: Bit error rate.
        bits: 32: the bits of the floating-point words. 1 to 16: the bits of the codes of a uniform quantization to the
            nearest, whose range is received without errors.
        channel: The arguments of :class:`Channel`. On the downlink the message is the model.

    Raises:
        ValueError: If an argument is out of range.
    """

    key = "BitFlipChannel"

    def __init__(self, rate: float, bits: int = 32, **channel: Any) -> None:
        argument_names.check_names(type(self).__name__, channel, argument_names.constructor_names(type(self)))
        super().__init__(**channel)
        self.rate = arguments.probability("rate", rate)
        self.bits = check_bits(bits)

    def encode(self, size: MessageSize) -> MessageSize:
        """Return the size of the codes and of their range, two numbers of 32 bits."""
        if self.bits == 32 or not self.rate:
            return size
        return MessageSize(size.values, self.bits, size.side + 64)

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """Return the message with flipped bits; see :meth:`Channel.transmit`."""
        if not self.rate:
            return message
        generator = self.stream(seed, round_idx, client, "flips")
        return self.on_sent(lambda sent: self._flipped(sent, generator), message)

    def _flipped(self, sent: Tensor, generator: torch.Generator) -> Tensor:
        if self.bits == 32:
            # The same memory as integers, whose bits can be changed.
            word_dtype = torch.int64 if sent.dtype == torch.float64 else torch.int32
            word_bits = 8 * sent.element_size()
            return flip(sent.view(word_dtype), word_bits, self.rate, generator).view(sent.dtype)
        return through_codes(sent, self.bits, change=lambda codes: flip(codes, self.bits, self.rate, generator))

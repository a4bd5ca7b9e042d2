"""Messages of few bits: uniform quantization, and QSGD.

D. Alistarh, D. Grubic, J. Li, R. Tomioka, M. Vojnovic: QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding. NeurIPS 2017, Section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.channel.base import BlockChannel, MessageSize, Per
from lightning_fedhaw.channel.scale import rescaled

Scheme = Literal["stochastic", "nearest", "qsgd"]
MOST_BITS = 16


def to_codes(vector: Tensor, bits: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers as whole multiples of a step above their minimum.

    Range and step are numbers of the vector's dtype and have to fit in there; :func:`through_codes` sees to it.

    Args:
        vector: ``[d]``, finite.
        bits: b; there are ``2^b - 1`` steps between the minimum and the maximum.
        generator: For rounding up with the probability that is left over, which is unbiased; to the nearest without.

    Returns:
        ``[d]`` int64 codes of 0 to ``2^b - 1``, the minimum and the step, both scalars; a step of 0 where all numbers
        are equal.

    Example:
        >>> codes, low, step = to_codes(torch.tensor([-1.0, 0.2, 0.6]), bits=2)
        >>> codes.tolist(), from_codes(codes, low, step)
        ([0, 2, 3], tensor([-1.0000,  0.0667,  0.6000]))
    """
    low, high = torch.aminmax(vector)
    # Half of the range first: the whole of it may be larger than any number.
    step = (high / 2 - low / 2) / ((2**bits - 1) / 2)
    where = (vector - low).div_(step) if step > 0 else torch.zeros_like(vector)
    codes = where.round_() if generator is None else _round_at_random(where, generator)
    return codes.clamp_(0, 2**bits - 1).long(), low, step


def from_codes(codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """What :func:`to_codes` stands for."""
    return low + codes * step


def through_codes(
    vector: Tensor,
    bits: int,
    generator: torch.Generator | None = None,
    change: Callable[[Tensor], Tensor] = lambda codes: codes,
) -> Tensor:
    """A vector as it is received in uniform codes: within a step of what was sent, up to the rounding of its dtype.

    That holds for every finite vector, subnormal numbers and a range beyond the largest number included.

    Args:
        vector: ``[d]``, finite.
        bits: As in :func:`to_codes`.
        generator: As there.
        change: ``[d] -> [d]``, what becomes of the codes on the way.
    """

    def received(scaled: Tensor) -> Tensor:
        codes, low, step = to_codes(scaled, bits, generator)
        return from_codes(change(codes), low, step)

    # The highest code may be rounded to above the maximum, which may be the largest number that there is.
    largest = torch.finfo(vector.dtype).max
    return rescaled(received, vector).clamp_(-largest, largest)


def qsgd(vector: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """``Q(v)_i = |v| sign(v_i) xi_i / s``, with ``xi_i`` one of the two whole numbers around ``s |v_i| / |v|``.

    It is unbiased, and ``E|Q(v) - v|^2 <= min(d / s^2, sqrt(d) / s) |v|^2``. Each number is within a level ``|v| / s``
    of what it was, up to the rounding of the vector's dtype and however small the vector is; a level that is larger
    than any number of the dtype is infinite.

    Args:
        vector: ``[d]``, finite.
        levels: s, the number of steps from 0 to the norm.
        generator: Where the draws come from.
    """

    def quantized(scaled: Tensor) -> Tensor:
        norm = float(torch.linalg.vector_norm(scaled, dtype=torch.float64))
        if norm == 0:
            return scaled
        steps = _round_at_random(scaled.abs().div_(norm).mul_(levels), generator)
        return steps.mul_(norm / levels).copysign_(scaled)

    return rescaled(quantized, vector)


def _round_at_random(numbers: Tensor, generator: torch.Generator) -> Tensor:
    whole = numbers.floor()
    draws = torch.rand(numbers.shape, generator=generator, dtype=numbers.dtype).to(numbers.device)
    return whole.add_(draws < numbers.sub_(whole))


def check_bits(value: object) -> int:
    """Check a number of bits.

    Raises:
        ValueError: If it is not from 1 to 16, and not 32 either.
    """
    bits = arguments.plain_number(value)
    if isinstance(bits, int) and (1 <= bits <= MOST_BITS or bits == 32):
        return bits
    raise arguments.invalid("bits", f"a whole number from 1 to {MOST_BITS}, or 32 to change nothing", value)


class QuantizationChannel(BlockChannel):
    """Sends each number in a few bits.

    Args:
        bits: Of each number, 1 to 16; with 32 nothing is changed.
        scheme: ``"stochastic"``: ``2^bits`` equal steps from the smallest number to the largest, rounded at random so
            that the mean is right. ``"nearest"``: the same, rounded to the nearest. ``"qsgd"``: sign, and
            ``2^(bits - 1) - 1`` steps from 0 to the norm, rounded at random.
        per: Whether range or norm is that of the whole message or of each layer.
        channel: The arguments of :class:`Channel`. On the downlink the message is the model.

    Raises:
        ValueError: If an argument is out of range.
    """

    key = "QuantizedChannel"

    def __init__(self, bits: int = 8, scheme: Scheme = "stochastic", *, per: Per = "update", **channel: Any) -> None:
        super().__init__(per, **channel)
        self.bits = check_bits(bits)
        self.scheme = arguments.choice("scheme", scheme, Scheme)
        if self.scheme == "qsgd" and self.bits == 1:
            raise ValueError('`bits` must be at least 2 with `scheme="qsgd"`, one of which is the sign, got 1.')

    def encode(self, size: MessageSize) -> MessageSize:
        """``bits`` a number, and a range (64 bits) or a norm (32) for each block."""
        if self.bits == 32:
            return size
        side = (32 if self.scheme == "qsgd" else 64) * len(self.blocks)
        return MessageSize(size.values, self.bits, size.side + side)

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """The message, rounded; see :meth:`Channel.transmit`."""
        if self.bits == 32:
            return message
        generator = None if self.scheme == "nearest" else self.stream(seed, round_idx, client, "rounding")
        return self.blockwise(lambda block: self._rounded(block, generator), message)

    def _rounded(self, block: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.scheme == "qsgd":
            assert generator is not None
            return qsgd(block, 2 ** (self.bits - 1) - 1, generator)
        return through_codes(block, self.bits, generator)

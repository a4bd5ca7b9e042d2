"""Quantization: uniform quantization, and QSGD.

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
    """Quantize numbers to integer multiples of a step above their minimum.

    Range and step are computed in the vector's dtype and must be normal numbers there; :func:`through_codes` scales
    vectors for which they are not.

    Args:
        vector: ``[d]``, finite.
        bits: b; there are ``2^b - 1`` steps between the minimum and the maximum.
        generator: The source of the draws for stochastic rounding, which is unbiased. Without it numbers are rounded to
            the nearest.

    Returns:
        The codes ``[d]`` int64 from 0 to ``2^b - 1``, the minimum, and the step, both scalars. The step is 0 if all
        numbers are equal.

    Example:
        >>> codes, low, step = to_codes(torch.tensor([-1.0, 0.2, 0.6]), bits=2)
        >>> codes.tolist(), from_codes(codes, low, step)
        ([0, 2, 3], tensor([-1.0000,  0.0667,  0.6000]))
    """
    low, high = torch.aminmax(vector)
    # Half of the range, because the whole range may overflow.
    step = (high / 2 - low / 2) / ((2**bits - 1) / 2)
    positions = (vector - low).div_(step) if step > 0 else torch.zeros_like(vector)
    codes = positions.round_() if generator is None else _stochastically_rounded(positions, generator)
    # The division may be rounded to just above the last code.
    return codes.clamp_(0, 2**bits - 1).long(), low, step


def from_codes(codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Return the numbers that the codes of :func:`to_codes` represent."""
    return low + codes * step


def through_codes(
    vector: Tensor,
    bits: int,
    generator: torch.Generator | None = None,
    change: Callable[[Tensor], Tensor] = lambda codes: codes,
) -> Tensor:
    """Quantize a vector uniformly and return the numbers that its codes represent.

    Each number is within one step of the original, up to the rounding of its dtype, for every finite vector; subnormal
    numbers and ranges above the largest number are included.

    Args:
        vector: ``[d]``, finite.
        bits: As in :func:`to_codes`.
        generator: As in :func:`to_codes`.
        change: ``[d] -> [d]``, the change of the codes during transmission, such as bit errors.
    """

    def quantized(scaled: Tensor) -> Tensor:
        codes, low, step = to_codes(scaled, bits, generator)
        return from_codes(change(codes), low, step)

    # The highest code may represent a number just above the maximum, which overflows if the maximum is the largest.
    largest = torch.finfo(vector.dtype).max
    return rescaled(quantized, vector).clamp_(-largest, largest)


def qsgd(vector: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """Quantize a vector by QSGD.

    ``Q(v)_i = |v| sign(v_i) xi_i / s``, where ``xi_i`` is one of the two integers around ``s |v_i| / |v|``, drawn so
    that the mean is ``v_i``. The error is ``E|Q(v) - v|^2 <= min(d / s^2, sqrt(d) / s) |v|^2``. Each number is within
    one level ``|v| / s`` of the original, up to the rounding of the vector's dtype, however small the vector is; a
    level above the largest number of the dtype becomes infinite.

    Args:
        vector: ``[d]``, finite.
        levels: s, the number of levels from 0 to the norm.
        generator: The source of the draws.
    """

    def quantized(scaled: Tensor) -> Tensor:
        norm = float(torch.linalg.vector_norm(scaled, dtype=torch.float64))
        if norm == 0:
            return scaled
        magnitudes = scaled.abs().div_(norm).mul_(levels)
        steps = _stochastically_rounded(magnitudes, generator)
        return steps.mul_(norm / levels).copysign_(scaled)

    return rescaled(quantized, vector)


def _stochastically_rounded(numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Round up with the probability of the fractional part, else down; the numbers are overwritten."""
    floors = numbers.floor()
    # Drawn on the CPU, so that one seed gives the same rounding on every device.
    draws = torch.rand(numbers.shape, generator=generator, dtype=numbers.dtype).to(numbers.device)
    fractions = numbers.sub_(floors)
    return floors.add_(draws < fractions)


def check_bits(value: object) -> int:
    """Check a number of bits.

    Args:
        value: The value of the argument ``bits``.

    Raises:
        ValueError: If it is neither from 1 to 16 nor 32.
    """
    bits = arguments.plain_number(value)
    if isinstance(bits, int) and (1 <= bits <= MOST_BITS or bits == 32):
        return bits
    raise arguments.invalid("bits", f"a whole number from 1 to {MOST_BITS}, or 32 to change nothing", value)


class QuantizationChannel(BlockChannel):
    """A channel that quantizes each number of a message to a few bits.

    Args:
        bits: Bits of each number, from 1 to 16; with 32 nothing is changed.
        scheme: ``"stochastic"``: ``2^bits`` equally spaced values from the smallest number to the largest, with
            stochastic rounding, which is unbiased. ``"nearest"``: the same values, with rounding to the nearest.
            ``"qsgd"``: a sign, and ``2^(bits - 1) - 1`` levels from 0 to the norm, with stochastic rounding.
        per: Whether the range or the norm is that of the whole message or of each layer.
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
        """Return ``bits`` per number, and for each block a range (64 bits) or a norm (32 bits)."""
        if self.bits == 32:
            return size
        block_bits = 32 if self.scheme == "qsgd" else 64
        return MessageSize(size.values, self.bits, size.side + block_bits * len(self.blocks))

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """Return the quantized message; see :meth:`Channel.transmit`."""
        if self.bits == 32:
            return message
        generator: torch.Generator | None = None
        if self.scheme != "nearest":
            generator = self.stream(seed, round_idx, client, "rounding")
        return self.blockwise(lambda block: self._quantized(block, generator), message)

    def _quantized(self, block: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.scheme == "qsgd":
            assert generator is not None
            # One bit is the sign.
            return qsgd(block, 2 ** (self.bits - 1) - 1, generator)
        return through_codes(block, self.bits, generator)

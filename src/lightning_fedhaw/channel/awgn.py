"""Additive white Gaussian noise on every number of a message."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.channel.base import BlockChannel, MessageSize, Per
from lightning_fedhaw.channel.scale import ordinary, rescaled


def rms(vector: Tensor) -> float:
    """Root mean square of a vector: the root of its power ``|v|^2 / d``."""
    scaled, power = ordinary(vector)
    return float(torch.linalg.vector_norm(scaled, dtype=torch.float64)) / sqrt(max(vector.numel(), 1)) / power


def noise_std(rms: float, snr_db: float) -> float:
    """Standard deviation of the noise at a signal-to-noise ratio of ``10 log10(rms^2 / std^2)`` decibels.

    Example:
        >>> round(noise_std(12.5**0.5, snr_db=10.0) ** 2, 6)
        1.25
    """
    return float(rms * 10 ** (-snr_db / 20))


def add_noise(vector: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """A vector with independent normal noise; itself, and no draw, where there is none."""
    if not std > 0:
        return vector
    # Drawn on the CPU, so that one seed gives the same noise on every device.
    noise = torch.randn(vector.shape, generator=generator, dtype=vector.dtype).to(vector.device)
    limits = torch.finfo(vector.dtype)
    if limits.tiny <= std <= limits.max / 16:
        return vector.add(noise, alpha=std)
    # No normal number of the vector's precision: a tiny one would lose its digits, a huge one is refused by torch.
    return vector.double().add(noise.double(), alpha=std).to(vector.dtype)


def add_relative_noise(vector: Tensor, snr_db: float, generator: torch.Generator) -> Tensor:
    """A vector ``[d]`` with noise at a signal-to-noise ratio of its own power, however small or large it is."""
    return rescaled(lambda scaled: add_noise(scaled, noise_std(rms(scaled), snr_db), generator), vector)


class AWGNChannel(BlockChannel):
    """Adds white Gaussian noise: ``received = sent + z`` with ``z ~ N(0, std^2)`` on each number.

    Give one of ``snr_db`` and ``noise_std``.

    Args:
        snr_db: Signal-to-noise ratio at the receiver in decibels, ``10 log10(P / std^2)`` with the message's own power
            ``P = |message|^2 / d``. A sender of power ``P_tx`` that scales its message to it, and a receiver with the
            noise floor ``N``, which scales back, are ``snr_db = 10 log10(P_tx / N)``. A message of zeros stays so.
        noise_std: The same noise for everybody, however large the message: the root of a noise floor, in units of a
            parameter. A message is sent as it is.
        per: Whether ``P`` is that of the whole message or of each layer.
        channel: The arguments of :class:`Channel`. On the downlink the message is the model.

    Raises:
        ValueError: If not exactly one is given, or it is NaN, below -200 (``snr_db``), or negative or infinite
            (``noise_std``).
    """

    key = "AWGNChannel"

    def __init__(
        self,
        snr_db: float | None = None,
        *,
        noise_std: float | None = None,
        per: Per = "update",
        **channel: Any,
    ) -> None:
        super().__init__(per, **channel)
        if (snr_db is None) == (noise_std is None):
            raise ValueError(f"Give one of `snr_db` and `noise_std`, got {snr_db!r} and {noise_std!r}.")
        self.snr_db = arguments.optional(decibels, "snr_db", snr_db)
        self.noise_std = arguments.number("noise_std", 0.0 if noise_std is None else noise_std, minimum=0)

    def encode(self, size: MessageSize) -> MessageSize:
        """The power of each block travels with it."""
        return size if self.snr_db is None else with_power(size, len(self.blocks))

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """The message with noise on it; see :meth:`Channel.transmit`."""
        snr_db, generator = self.snr_db, self.stream(seed, round_idx, client, "noise")
        if snr_db is None:
            return self.on_sent(lambda sent: add_noise(sent, self.noise_std, generator), message)
        if snr_db == float("inf"):
            return message
        return self.blockwise(lambda block: add_relative_noise(block, snr_db, generator), message)


def decibels(name: str, value: object) -> float:
    """Check a signal-to-noise ratio; infinity is no noise.

    Raises:
        ValueError: If it is none.
    """
    return arguments.number(name, value, minimum=-200, infinite=True)


def with_power(size: MessageSize, blocks: int) -> MessageSize:
    """A message that carries the power of its blocks as float32."""
    return MessageSize(size.values, size.bits, size.side + 32 * blocks)

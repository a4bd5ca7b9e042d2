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
    """Return the root mean square of a vector: the square root of its power ``|v|^2 / d``."""
    scaled, factor = ordinary(vector)
    norm = float(torch.linalg.vector_norm(scaled, dtype=torch.float64))
    length = max(vector.numel(), 1)
    return norm / sqrt(length) / factor


def noise_std(rms: float, snr_db: float) -> float:
    """Return the standard deviation of the noise at a signal-to-noise ratio ``10 log10(rms^2 / std^2)``.

    Args:
        rms: Root mean square of the message.
        snr_db: Signal-to-noise ratio in decibels.

    Example:
        >>> round(noise_std(12.5**0.5, snr_db=10.0) ** 2, 6)
        1.25
    """
    return float(rms * 10 ** (-snr_db / 20))


def add_noise(vector: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Add independent normal noise to a vector.

    Args:
        vector: ``[d]``, floating.
        std: Standard deviation of the noise. If it is not positive, the vector itself is returned.
        generator: The source of the draws, on the CPU.
    """
    if not std > 0:
        return vector
    # Drawn on the CPU, so that one seed gives the same noise on every device.
    noise = torch.randn(vector.shape, generator=generator, dtype=vector.dtype).to(vector.device)
    limits = torch.finfo(vector.dtype)
    if limits.tiny <= std <= limits.max / 16:
        return vector.add(noise, alpha=std)
    # In float64: a std below the smallest normal number of the dtype would lose digits, and torch refuses a huge one.
    return vector.double().add(noise.double(), alpha=std).to(vector.dtype)


def add_relative_noise(vector: Tensor, snr_db: float, generator: torch.Generator) -> Tensor:
    """Add noise to a vector at a signal-to-noise ratio relative to the vector's own power.

    Args:
        vector: ``[d]``, floating, of any magnitude.
        snr_db: Signal-to-noise ratio in decibels.
        generator: The source of the draws, on the CPU.
    """

    def noisy(scaled: Tensor) -> Tensor:
        std = noise_std(rms(scaled), snr_db)
        return add_noise(scaled, std, generator)

    return rescaled(noisy, vector)


class AWGNChannel(BlockChannel):
    """A channel with additive white Gaussian noise: ``received = sent + z``, ``z ~ N(0, std^2)`` for each number.

    Give either ``snr_db`` or ``noise_std``.

    Args:
        snr_db: Signal-to-noise ratio at the receiver in decibels, ``10 log10(P / std^2)`` with the message's own power
            ``P = |message|^2 / d``. If the sender scales its message to the transmit power ``P_tx`` and the receiver,
            whose noise has the power ``N``, scales it back, this is ``snr_db = 10 log10(P_tx / N)``. A message of
            zeros is received without noise.
        noise_std: Standard deviation of the noise, the same for all clients and messages, in the unit of the
            parameters. Messages are sent without scaling.
        per: Whether ``P`` is the power of the whole message or of each layer.
        channel: The arguments of :class:`Channel`. On the downlink the message is the model.

    Raises:
        ValueError: If not exactly one of them is given, or it is NaN, below -200 (``snr_db``), or negative or
            infinite (``noise_std``).
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
            raise ValueError(f"Give either `snr_db` or `noise_std`, got {snr_db!r} and {noise_std!r}.")
        self.snr_db = arguments.optional(decibels, "snr_db", snr_db)
        self.noise_std = arguments.number("noise_std", 0.0 if noise_std is None else noise_std, minimum=0)

    def encode(self, size: MessageSize) -> MessageSize:
        """Add the power of each block, which the receiver needs to scale the block back."""
        if self.snr_db is None:
            return size
        return with_power(size, len(self.blocks))

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """Return the message with noise; see :meth:`Channel.transmit`."""
        snr_db = self.snr_db
        generator = self.stream(seed, round_idx, client, "noise")
        if snr_db is None:
            return self.on_sent(lambda sent: add_noise(sent, self.noise_std, generator), message)
        if snr_db == float("inf"):
            return message
        return self.blockwise(lambda block: add_relative_noise(block, snr_db, generator), message)


def decibels(name: str, value: object) -> float:
    """Check a signal-to-noise ratio in decibels; infinity means no noise.

    Args:
        name: The argument.
        value: Its value.

    Raises:
        ValueError: If it is not a number of at least -200.
    """
    # At -200 dB the noise is already 10^10 times as large as the message: anything lower is a mistake.
    return arguments.number(name, value, minimum=-200, infinite=True)


def with_power(size: MessageSize, blocks: int) -> MessageSize:
    """Return the size of a message that carries the power of each of its blocks as a float32."""
    return MessageSize(size.values, size.bits, size.side + 32 * blocks)

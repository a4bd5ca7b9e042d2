"""Fading channels: the gain of the link between a client and the server changes from round to round."""

from __future__ import annotations

from math import log2, log10, sqrt
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.channel.awgn import add_relative_noise, decibels, with_power
from lightning_fedhaw.channel.base import BlockChannel, MessageSize, Per


def power_gain(k_factor: float, generator: torch.Generator) -> float:
    """Draw the power gain ``|h|^2`` of a Rician fading channel, whose mean is 1.

    ``h = sqrt(K / (K + 1)) + sqrt(1 / (K + 1)) CN(0, 1)``.

    Args:
        k_factor: K, the power of the line-of-sight path divided by that of the scattered paths. 0 is Rayleigh fading,
            for which ``|h|^2`` is exponentially distributed; infinity is no fading.
        generator: The source of the draw.
    """
    re, im = torch.randn(2, generator=generator, dtype=torch.float64).tolist()
    if k_factor == float("inf"):
        return 1.0
    line_of_sight = sqrt(k_factor / (k_factor + 1))
    # Half of the scattered power is in the real part, half in the imaginary part.
    scatter = sqrt(0.5 / (k_factor + 1))
    return float((line_of_sight + scatter * re) ** 2 + (scatter * im) ** 2)


class FadingChannel(BlockChannel):
    """A block-fading channel (Rayleigh or Rician), flat over a message, whose receiver knows the gain.

    The instantaneous signal-to-noise ratio is ``SNR_k = |h_k|^2 SNR`` with ``E|h_k|^2 = 1``. By default every message
    is received, with the noise of :class:`AWGNChannel` at ``SNR_k``.

    Args:
        snr_db: The mean signal-to-noise ratio ``SNR`` in decibels, with the power as defined in :class:`AWGNChannel`.
        k_factor: Rician factor K (linear, not in decibels); 0 is Rayleigh fading.
        block: The number of rounds for which a client's gain stays the same.
        rate: Messages are coded with this many bits per channel use: a message is lost if ``log2(1 + SNR_k) < rate``,
            and received without errors otherwise. With Rayleigh fading a share ``1 - exp(-(2^rate - 1) / SNR)`` is
            lost.
        inversion: Clients know their gain and divide by it, so that the receiver has ``SNR`` for every gain.
        truncation: With ``inversion``, a client does not transmit while ``|h_k|^2`` is below this number, so that it
            never needs more than ``1 / truncation`` times the power; with Rayleigh fading these are a share
            ``1 - exp(-truncation)`` of the messages. 0: it always transmits.
        per: Whether the power is that of the whole message or of each layer.
        channel: The arguments of :class:`Channel`.

    Raises:
        ValueError: If an argument is out of range, or two arguments exclude each other.
    """

    key = "FadingChannel"

    def __init__(
        self,
        snr_db: float,
        *,
        k_factor: float = 0.0,
        block: int = 1,
        rate: float | None = None,
        inversion: bool = False,
        truncation: float = 0.0,
        per: Per = "update",
        **channel: Any,
    ) -> None:
        super().__init__(per, **channel)
        self.snr_db = decibels("snr_db", snr_db)
        self.k_factor = arguments.number("k_factor", k_factor, minimum=0, infinite=True)
        self.block = arguments.integer("block", block, minimum=1)
        self.truncation = arguments.number("truncation", truncation, minimum=0)
        self.rate = arguments.optional(arguments.number, "rate", rate, minimum=0)
        self.inversion = arguments.flag("inversion", inversion)
        if self.rate is not None and self.inversion:
            raise ValueError("Give `rate` or `inversion=True`, not both: a coded message needs no inversion.")
        if self.truncation and not self.inversion:
            raise ValueError(
                f"`truncation`={self.truncation} bounds the power of inversion: set `inversion=True` with it."
            )

    def gain(self, round_idx: int, client: int, seed: int) -> float:
        """Return the power gain ``|h|^2`` of a client's link in a round.

        Args:
            round_idx: The round's number.
            client: The client.
            seed: The federation's seed.
        """
        return power_gain(self.k_factor, self.stream(seed, round_idx // self.block, client, "gain"))

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """Return which clients have too small a gain; see :meth:`Channel.outage`."""
        if self.rate is None and not self.truncation:
            return super().outage(round_idx, clients, seed)
        gains = [self.gain(round_idx, client, seed) for client in clients]
        if self.rate is None:
            # Inverting a smaller gain would take more power than the client has.
            return torch.tensor([gain < self.truncation for gain in gains])
        # Capped, because powers of ten above 10^308 overflow; such a ratio is as good as infinite.
        snr = 10 ** min(self.snr_db / 10, 300.0)
        # Shannon's capacity of the link: a code of a higher rate cannot be decoded.
        return torch.tensor([log2(1 + gain * snr) < self.rate for gain in gains])

    def encode(self, size: MessageSize) -> MessageSize:
        """Add the power of each block to an uncoded message; see :meth:`AWGNChannel.encode`."""
        if self.rate is not None:
            return size
        return with_power(size, len(self.blocks))

    def transmit(self, message: Tensor, *, round_idx: int, client: int, seed: int) -> Tensor:
        """Return the message with noise that depends on the gain; see :meth:`Channel.transmit`."""
        if self.rate is not None or self.snr_db == float("inf"):
            return message
        snr_db = self.snr_db
        if not self.inversion:
            # A gain of 0 has no logarithm; at 1e-20 nothing is left of the message anyway.
            gain = max(self.gain(round_idx, client, seed), 1e-20)
            snr_db += 10 * log10(gain)
        generator = self.stream(seed, round_idx, client, "noise")
        return self.blockwise(lambda block: add_relative_noise(block, snr_db, generator), message)

"""Over-the-air computation: the clients transmit at the same time, and the wireless channel adds their signals.

G. Zhu, Y. Wang, K. Huang: Broadband Analog Aggregation for Low-Latency Federated Edge Learning. IEEE TWC 2020.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.channel.awgn import add_noise, decibels
from lightning_fedhaw.channel.base import AggregateChannel, Arrivals, Fallback
from lightning_fedhaw.channel.fading import power_gain


def receiver_noise(weights: Tensor, rms: Tensor, gains: Tensor, snr_db: float) -> float:
    """Return the standard deviation of the noise on a sum that is received over the air.

    Client k sends ``sqrt(zeta) / h_k`` times its weighted update. The amplification ``zeta`` is the same for all
    clients, and is the largest with which no client needs more than the power ``P_tx``:
    ``zeta = P_tx min_k |h_k|^2 / (w_k rms_k)^2``. The server divides the sum, with its noise, by ``sqrt(zeta)``.

    Args:
        weights: ``[K]``, the weights of the clients that send.
        rms: ``[K]``, root mean squares of their updates.
        gains: ``[K]``, their power gains ``|h_k|^2``.
        snr_db: ``10 log10(P_tx / N)``, with the receiver's noise power ``N``.
    """
    amplitudes = weights * rms / gains.sqrt()
    return float(amplitudes.max()) * 10 ** (-snr_db / 20)


class OverTheAirChannel(AggregateChannel):
    """Analog superposition of the whole cohort, with truncated channel inversion and receiver noise.

    Clients scale their weighted updates by the inverse of their gains, so that all are received with the right weight.
    The server receives the sum with noise, and divides by the weights of the clients that sent. A client in a deep fade
    does not transmit. All clients use the same amplification, so a client with a large weight, a large update or a
    small gain determines the noise for all.

    The server sees only the sum, so rules that need each client's update are refused.

    Args:
        snr_db: Transmit power divided by receiver noise power, in decibels: the signal-to-noise ratio of a single
            client that transmits at full power with a gain of 1.
        truncation: A client does not transmit if ``|h_k|^2`` is below this number; with Rayleigh fading it transmits
            in a share ``exp(-truncation)`` of the rounds.
        k_factor: Rician factor K; 0 is Rayleigh fading, infinity is no fading.
        block: The number of rounds for which a client's gain stays the same.
        fallback: ``"discard"``: a client that does not transmit has no weight. ``"zero_update"``: it keeps its weight.
        name: As in :class:`Channel`. The channel is always on the uplink.

    Raises:
        ValueError: If an argument is out of range; at the start of a fit, if the rule needs single updates.
    """

    key = "OverTheAirChannel"

    def __init__(
        self,
        snr_db: float,
        truncation: float = 0.1,
        *,
        k_factor: float = 0.0,
        block: int = 1,
        fallback: Fallback = "discard",
        name: str | None = None,
    ) -> None:
        super().__init__(fallback, name)
        self.snr_db = decibels("snr_db", snr_db)
        self.truncation = arguments.number("truncation", truncation, minimum=0)
        self.k_factor = arguments.number("k_factor", k_factor, minimum=0, infinite=True)
        self.block = arguments.integer("block", block, minimum=1)

    def _gains(self, round_idx: int, clients: Sequence[int], seed: int) -> Tensor:
        """Return the clients' power gains ``|h_k|^2``, ``[K]`` float64."""
        gains = []
        for client in clients:
            generator = self.stream(seed, round_idx // self.block, client, "gain")
            gains.append(power_gain(self.k_factor, generator))
        return torch.tensor(gains, dtype=torch.float64)

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """Return which clients are in a deep fade; see :meth:`Channel.outage`."""
        return self._gains(round_idx, clients, seed) < self.truncation

    def superpose(self, total: Tensor, arrivals: Arrivals) -> Tensor:
        """Return the sum with the receiver's noise; see :meth:`AggregateChannel.superpose`."""
        gains = self._gains(arrivals.round, arrivals.clients, arrivals.seed)
        std = receiver_noise(arrivals.weights, arrivals.rms, gains, self.snr_db)
        # One stream for the round and not one per client, because there is one receiver.
        generator = self._named_stream(arrivals.seed, "round", arrivals.round, "noise")
        return add_noise(total, std, generator)

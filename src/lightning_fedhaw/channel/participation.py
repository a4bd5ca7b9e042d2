"""Clients that come too late, and clients that are not there."""

from __future__ import annotations

from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.channel.base import Channel, ChannelContext, Fallback


class StragglerChannel(Channel):
    """Stragglers: the server waits until a deadline, and does without who is not back by then.

    A client computes for ``n_k seconds_per_sample exp(client_spread u_k + spread z)`` seconds, ``n_k`` being its
    training samples and ``u_k`` (once a run) and ``z`` (every round) standard normal: log-normal with the median
    ``n_k seconds_per_sample``. Without ``client_spread`` it is late with probability
    ``1 - Phi(log(deadline / (n_k seconds_per_sample)) / spread)``.

    Args:
        deadline: Seconds.
        seconds_per_sample: Median time for a training sample, all its local epochs together.
        spread: Standard deviation of the logarithm of a client's time from round to round.
        client_spread: That of the logarithm of clients' speeds.
        fallback: As in :class:`Channel`.
        name: As in :class:`Channel`. The channel is for the uplink.

    Raises:
        ValueError: If an argument is out of range.
    """

    key = "DeadlineChannel"

    def __init__(
        self,
        deadline: float,
        seconds_per_sample: float,
        spread: float = 0.5,
        client_spread: float = 0.0,
        *,
        fallback: Fallback = "discard",
        name: str | None = None,
    ) -> None:
        super().__init__(fallback=fallback, name=name)
        self.deadline = arguments.number("deadline", deadline, minimum=0, infinite=True)
        self.seconds_per_sample = arguments.number("seconds_per_sample", seconds_per_sample, minimum=0)
        self.spread = arguments.number("spread", spread, minimum=0, maximum=100)
        self.client_spread = arguments.number("client_spread", client_spread, minimum=0, maximum=100)

    def seconds(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """How long clients compute in a round, ``[K]`` float64."""
        paths = [
            (self._stream(seed, "client", client, "speed"), self.stream(seed, round_idx, client, "time"))
            for client in clients
        ]
        draws = [[float(torch.randn((), generator=g, dtype=torch.float64)) for g in each] for each in paths]
        exponents = torch.tensor(draws, dtype=torch.float64).view(-1, 2) @ torch.tensor(
            [self.client_spread, self.spread], dtype=torch.float64
        )
        return self.context.num_examples[clients] * self.seconds_per_sample * exponents.exp()

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """Who is late; see :meth:`Channel.outage`."""
        return self.seconds(round_idx, clients, seed) > self.deadline


class AvailabilityChannel(Channel):
    """Clients that can be reached in some rounds only: in a daily rhythm, or by a trace.

    The sampler draws the cohort as it would without; who was drawn and cannot be reached does not train and is not
    received. So availability is an outage, and adding it changes nobody else's numbers.

    Args:
        trace: ``[rounds, clients]`` booleans or probabilities of being there, or a file with such numbers (``.npy``, or
            text with a row a round, separated by commas or blanks). It begins anew after its last round.
        mean: Without a trace, the share of rounds in which a client is there: with probability
            ``clip(mean + amplitude cos(2 pi (round / period - u_k)), 0, 1)``.
        amplitude: How far the probability goes up and down.
        period: Rounds of a day.
        phases: A client's hour of the day ``u_k`` in [0, 1), ``[N]``; drawn uniformly once a run by default. All zero:
            clients of one time zone.
        fallback: As in :class:`Channel`.
        name: As in :class:`Channel`. The channel is for the uplink.

    Raises:
        ValueError: If an argument is out of range, or not of N clients.
    """

    key = "AvailabilityChannel"

    def __init__(
        self,
        trace: Any = None,
        *,
        mean: float = 0.5,
        amplitude: float = 0.4,
        period: int = 24,
        phases: Any = None,
        fallback: Fallback = "discard",
        name: str | None = None,
    ) -> None:
        super().__init__(fallback=fallback, name=name)
        self.mean = arguments.probability("mean", mean)
        self.amplitude = arguments.probability("amplitude", amplitude)
        self.period = arguments.integer("period", period, minimum=1)
        self.trace = None if trace is None else read_trace(trace)
        self.phases = arguments.optional(
            arguments.numbers, "phases", phases, allowed="numbers in [0, 1], one per client", maximum=1
        )

    def prepare(self, context: ChannelContext) -> None:
        """Refuse a trace or phases of another federation."""
        count = context.num_clients
        if self.trace is not None and self.trace.shape[1] != count:
            raise ValueError(f"`trace` must have a column for each of {count} clients, got {self.trace.shape[1]}.")
        if self.phases is not None and self.phases.shape != (count,):
            raise ValueError(f"`phases` must be one number per client [{count}], got {list(self.phases.shape)}.")
        super().prepare(context)

    def probability(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """Of being there, ``[K]`` float64."""
        if self.trace is not None:
            return self.trace[round_idx % len(self.trace), clients]
        if self.phases is not None:
            phases = self.phases[clients].tolist()
        else:
            phases = [float(torch.rand((), generator=self._stream(seed, "client", k, "phase"))) for k in clients]
        waves = [self.mean + self.amplitude * cos(2 * pi * (round_idx / self.period - phase)) for phase in phases]
        return torch.tensor(waves, dtype=torch.float64)

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """Who is not there; see :meth:`Channel.outage`."""
        return self._uniform(seed, round_idx, clients, "presence") >= self.probability(round_idx, clients, seed)


def read_trace(trace: Any) -> Tensor:
    """A trace ``[rounds, clients]`` float64, from numbers or a file.

    Raises:
        ValueError: If it is no such table, or holds what is no probability.
    """
    if isinstance(trace, (str, Path)):
        path = Path(trace)
        trace = (
            np.load(path)
            if path.suffix == ".npy"
            else np.loadtxt(path.read_text().replace(",", " ").splitlines(), ndmin=2)
        )
    try:
        table = torch.as_tensor(trace, dtype=torch.float64)
    except (TypeError, ValueError):
        table = torch.empty(0)  # rows of unequal length, or no numbers
    if table.ndim != 2 or not len(table) or not ((table >= 0) & (table <= 1)).all():
        raise ValueError(
            "`trace` must be a table [rounds, clients] of booleans or probabilities, got the shape"
            f" {list(table.shape)}" + (f" with values from {table.min():g} to {table.max():g}." if len(table) else ".")
        )
    return table

"""Client participation: stragglers that miss a deadline, and clients that are unavailable."""

from __future__ import annotations

import warnings
from math import cos, pi
from pathlib import Path
from pickle import UnpicklingError
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.channel.base import Channel, ChannelContext, Fallback

_DAMAGES = (ValueError, EOFError, OSError, SyntaxError, TokenError, MemoryError, RecursionError, UnpicklingError)
"""What numpy raises depends on the byte at which it fails; a spoilt size asks for too much memory."""


class StragglerChannel(Channel):
    """Stragglers: the server waits until a deadline, and continues without the clients that are not done by then.

    A client computes for ``n_k seconds_per_sample exp(client_spread u_k + spread z)`` seconds. ``n_k`` is its number of
    training samples, and ``u_k`` (drawn once per run) and ``z`` (drawn every round) are standard normal, so the time is
    log-normal with the median ``n_k seconds_per_sample``. Without ``client_spread`` a client is late with probability
    ``1 - Phi(log(deadline / (n_k seconds_per_sample)) / spread)``.

    Args:
        deadline: The deadline in seconds.
        seconds_per_sample: Median time per training sample for all local epochs together, in seconds.
        spread: Standard deviation of the logarithm of a client's time from round to round.
        client_spread: Standard deviation of the logarithm of the speed from client to client.
        fallback: As in :class:`Channel`.
        name: As in :class:`Channel`. The channel is always on the uplink.

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
        """Draw how long clients compute in a round.

        Args:
            round_idx: The round's number.
            clients: The K clients.
            seed: The federation's seed.

        Returns:
            ``[K]`` float64, in seconds.
        """
        draws = torch.empty(len(clients), 2, dtype=torch.float64)
        for slot, client in enumerate(clients):
            # The first stream has no round in its name, so a client's speed is the same in every round.
            speed = self._named_stream(seed, "client", client, "speed")
            time = self.stream(seed, round_idx, client, "time")
            draws[slot, 0] = torch.randn((), generator=speed, dtype=torch.float64)
            draws[slot, 1] = torch.randn((), generator=time, dtype=torch.float64)
        spreads = torch.tensor([self.client_spread, self.spread], dtype=torch.float64)
        factors = (draws @ spreads).exp()
        return self.context.num_examples[clients] * self.seconds_per_sample * factors

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """Return which clients are late; see :meth:`Channel.outage`."""
        return self.seconds(round_idx, clients, seed) > self.deadline


class AvailabilityChannel(Channel):
    """Clients that are available only in some rounds, in a daily cycle or as in a trace.

    Client sampling does not know about availability: a client that is drawn and unavailable does not train, and its
    update counts as lost. Therefore adding this channel does not change the draws of other clients.

    Args:
        trace: ``[rounds, clients]`` booleans or probabilities of being available, or a file with such numbers
            (``.npy``, or text with one row per round, separated by commas or blanks). It is repeated after its last
            round.
        mean: Without a trace, the mean availability. In each round a client is available with probability
            ``clip(mean + amplitude cos(2 pi (round / period - u_k)), 0, 1)``.
        amplitude: The amplitude of that probability.
        period: The number of rounds per day.
        phases: The clients' times of day ``u_k`` in [0, 1), ``[N]``; drawn uniformly once per run by default. All zero:
            all clients are in one time zone.
        fallback: As in :class:`Channel`.
        name: As in :class:`Channel`. The channel is always on the uplink.

    Raises:
        ValueError: If an argument is out of range or, at the start of a fit, trace or phases are not for N clients.
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
        """Refuse a trace or phases for another number of clients.

        Raises:
            ValueError: If the trace or the phases are not for N clients.
        """
        count = context.num_clients
        if self.trace is not None and self.trace.shape[1] != count:
            raise ValueError(f"`trace` must have a column for each of {count} clients, got {self.trace.shape[1]}.")
        if self.phases is not None and self.phases.shape != (count,):
            raise ValueError(f"`phases` must be one number per client [{count}], got {list(self.phases.shape)}.")
        super().prepare(context)

    def probability(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """Return the probabilities that clients are available in a round.

        Args:
            round_idx: The round's number.
            clients: The K clients.
            seed: The federation's seed.

        Returns:
            ``[K]`` float64. Those of a daily cycle may be below 0 or above 1, which means never and always.
        """
        if self.trace is not None:
            # A run that is longer than the trace reads it again from its beginning.
            return self.trace[round_idx % len(self.trace), clients]
        probabilities = torch.empty(len(clients), dtype=torch.float64)
        for slot, client in enumerate(clients):
            angle = 2 * pi * (round_idx / self.period - self._phase(client, seed))
            probabilities[slot] = self.mean + self.amplitude * cos(angle)
        return probabilities

    def _phase(self, client: int, seed: int) -> float:
        if self.phases is not None:
            return float(self.phases[client])
        return float(torch.rand((), generator=self._named_stream(seed, "client", client, "phase")))

    def outage(self, round_idx: int, clients: list[int], seed: int) -> Tensor:
        """Return which clients are unavailable; see :meth:`Channel.outage`."""
        draws = self._uniform_draws(seed, round_idx, clients, "presence")
        return draws >= self.probability(round_idx, clients, seed)


def read_trace(trace: Any) -> Tensor:
    """Read an availability trace from numbers or a file.

    Args:
        trace: ``[rounds, clients]`` numbers, or the path of a ``.npy`` or text file.

    Returns:
        ``[rounds, clients]`` float64.

    Raises:
        ValueError: If it is not such a table, or one of its numbers is not in [0, 1].
        FileNotFoundError: If there is no such file.
    """
    if isinstance(trace, (str, Path)):
        trace = _load_table(Path(trace))
    try:
        table = torch.as_tensor(trace, dtype=torch.float64)
    except (TypeError, ValueError):
        # Rows of unequal length, or no numbers.
        table = torch.empty(0)
    is_table = table.ndim == 2 and len(table) > 0
    # NaN is refused too: it compares false.
    if is_table and ((table >= 0) & (table <= 1)).all():
        return table
    values = f" with values from {table.min():g} to {table.max():g}" if table.numel() else ""
    raise ValueError(
        "`trace` must be a table [rounds, clients] of booleans or probabilities, got the shape"
        f" {list(table.shape)}{values}."
    )


def _load_table(path: Path) -> NDArray[np.float64]:
    """Read the numbers of a file.

    Raises:
        ValueError: If it holds none, or is damaged.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`trace`: there is no file {str(path)!r}.")
    try:
        with warnings.catch_warnings():
            # An empty text is refused below, with the shape [0, 1].
            warnings.filterwarnings("ignore", message="loadtxt: input contained no data")
            return _read_table(path)
    except _DAMAGES as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"`trace`: {str(path)!r} is no table of numbers, or damaged: {reason.rstrip('.')}. Give a `.npy` file, or a"
            " text of one round per line with one number per client."
        ) from error


def _read_table(path: Path) -> NDArray[np.float64]:
    if path.suffix == ".npy":
        table = np.load(path)
        if not isinstance(table, np.ndarray):
            raise ValueError("it holds several arrays")
        return table
    lines = path.read_text().replace(",", " ").splitlines()
    return np.loadtxt(lines, ndmin=2)

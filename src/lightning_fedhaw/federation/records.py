"""The records of a round and of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.clients.records import Logged
from lightning_fedhaw.cohort import ClientUpdate

PHASES = ("broadcast", "local training", "channel", "aggregation", "validation")
"""The parts of a round whose time is measured."""


@dataclass
class Tally:
    """The costs and incidents of a run so far; part of a checkpoint.

    Attributes:
        seconds: Time spent in each of ``PHASES``.
        bytes_down: Bytes sent to clients.
        bytes_up: Bytes received from clients.
        received: Updates received, over all rounds.
        lost_messages: Messages that a channel lost, on either link.
        nonfinite_updates: Updates that were excluded because they held NaN or infinity.
        skipped_rounds: Rounds without any update to aggregate.
        skipped_steps: Optimizer steps that were tried and skipped.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    bytes_down: int = 0
    bytes_up: int = 0
    received: int = 0
    lost_messages: int = 0
    nonfinite_updates: int = 0
    skipped_rounds: int = 0
    skipped_steps: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all numbers, for a checkpoint."""
        return {**vars(self), "seconds": dict(self.seconds)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tally:
        """Make a tally of what :meth:`state_dict` gave."""
        return cls(**{**state, "seconds": dict(state["seconds"])})


@dataclass(frozen=True)
class RoundPlan:
    """What is decided before any client trains.

    Attributes:
        round: The round's number, from 0.
        clients: The clients that were drawn.
        start: ``[P]``, the global parameters that are broadcast.
        models: The model ``[P]`` that each client starts from; a client that received nothing and has none is absent.
        lost: The clients whose update will be lost, with the channel that loses it; they do not train.
    """

    round: int
    clients: Sequence[int]
    start: Tensor
    models: Mapping[int, Tensor]
    lost: Mapping[int, Channel]

    @property
    def trainees(self) -> list[int]:
        """The clients that train."""
        return [client for client in self.models if client not in self.lost]

    @property
    def slots(self) -> list[int]:
        """The clients that may have a slot in the cohort, in its order; a channel may fill that of a lost update."""
        return [*self.trainees, *self.lost]


@dataclass(frozen=True)
class UpdateRecord:
    """What every process knows of an update.

    Attributes:
        update: The update, without its vector and what only its client needs.
        received: Whether the message really came from the client.
        unnormalized_weight: Its weight before normalization, where the rule names it beforehand.
        rank: The process that holds its vector.
        rms: Root mean square of what was received, where a channel acts on the sum.
    """

    update: ClientUpdate
    received: bool
    unnormalized_weight: float
    rank: int
    rms: float


@dataclass(frozen=True)
class LocalResults:
    """What one process contributes to a round.

    Attributes:
        records: One record per update, in the order of the process's rows.
        excluded: A sentence for each client whose update was left out.
        end_state: The state of schedules and loss scale after its clients.
    """

    records: list[UpdateRecord]
    excluded: list[str]
    end_state: Any


@dataclass(frozen=True)
class Received:
    """What the server has received in a round, from all processes.

    Attributes:
        records: One record per update, in the cohort's order; slots that a channel filled are among them.
        excluded: A sentence for each client whose update was left out.
    """

    records: Sequence[UpdateRecord]
    excluded: Sequence[str]

    @property
    def from_clients(self) -> list[UpdateRecord]:
        """The records of messages that really came from their client."""
        return [record for record in self.records if record.received]

    @property
    def updates(self) -> list[ClientUpdate]:
        """The updates that really came from their client."""
        return [record.update for record in self.from_clients]


@dataclass(frozen=True)
class Aggregation:
    """What came of a round's aggregation.

    Attributes:
        metrics: The rule's numbers for the log.
        weights: The normalized weight of each client whose vector reached the aggregation.
    """

    metrics: Mapping[str, float]
    weights: Mapping[int, float]


@dataclass(frozen=True)
class Report:
    """What a round leaves behind for the log.

    Attributes:
        round: The round's number, from 0.
        clients: The clients that were drawn.
        metrics: The rule's and the round's own numbers.
        logged: What the clients' ``training_step`` logged, merged.
        weights: The normalized weight of each client whose vector reached the aggregation.
    """

    round: int
    clients: Sequence[int]
    metrics: Mapping[str, float]
    logged: Mapping[str, Logged]
    weights: Mapping[int, float]

"""The records of a round and of a run."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.clients.engine import EndState
from lightning_fedhaw.clients.records import Logged, values_of
from lightning_fedhaw.cohort import ClientUpdate, Cohort, factors_of
from lightning_fedhaw.inquiry import Answers
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.vectors.base import CohortVectors

PHASES = ("broadcast", "local training", "channel", "aggregation", "validation")
"""The phases of a round whose time is measured."""

PROBE_COUNTS = ("probe_answers", "probe_rounds", "skipped_probes")
"""What is counted of a rule's probe."""

INQUIRY_COUNTS = ("answers", "nonfinite_answers", "second_derivatives")
"""What is counted of a rule's inquiries."""


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
        probe_answers: Answers of a rule's probe that were received, over all rounds.
        probe_rounds: Communication rounds in addition to the run's, for a probe at the new model.
        skipped_probes: Rounds in which nothing was learned, because no answer of the probe was received and finite.
        answers: Answers to a rule's inquiries that were received, over all rounds.
        nonfinite_answers: Answers that were excluded because they held NaN or infinity.
        second_derivatives: Products with second derivatives of a loss that clients computed for them.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    bytes_down: int = 0
    bytes_up: int = 0
    received: int = 0
    lost_messages: int = 0
    nonfinite_updates: int = 0
    skipped_rounds: int = 0
    skipped_steps: int = 0
    probe_answers: int = 0
    probe_rounds: int = 0
    skipped_probes: int = 0
    answers: int = 0
    nonfinite_answers: int = 0
    second_derivatives: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def count_round(self, plan: RoundPlan, updates: Sequence[ClientUpdate], *, bytes_down: int, bytes_up: int) -> None:
        """Count the costs of a round.

        Args:
            plan: The plan of the round.
            updates: The updates that were received from their clients.
            bytes_down: Bytes that were sent to clients.
            bytes_up: Bytes that they sent.
        """
        self.bytes_down += bytes_down
        self.bytes_up += bytes_up
        self.received += len(updates)
        self.lost_messages += len(plan.clients) - len(plan.trainees)
        self.skipped_steps += sum(update.num_skipped for update in updates)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all numbers, for a checkpoint; those of probes and inquiries only if there were some."""
        state = {**vars(self), "seconds": dict(self.seconds)}
        for name in (*PROBE_COUNTS, *INQUIRY_COUNTS):
            if not state[name]:
                del state[name]
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tally:
        """Make a tally from what :meth:`state_dict` returned."""
        return cls(**{**state, "seconds": dict(state["seconds"])})


@dataclass(frozen=True)
class RoundPlan:
    """The decisions of a round before any client trains.

    Attributes:
        round: The round's number, from 0.
        clients: The clients that were sampled.
        start: ``[P]``, the global parameters that are broadcast.
        models: The model ``[P]`` that each client starts from; a client that received nothing and has none is absent.
        lost: The clients whose update will be lost, with the channel that loses it; they do not train.
        inverse_probabilities: Factors on the clients' weights, where their chances of being sampled are unequal.
        outdated: The clients that start from an older model, because this round's did not reach them.
    """

    round: int
    clients: Sequence[int]
    start: Tensor
    models: Mapping[int, Tensor]
    lost: Mapping[int, Channel]
    inverse_probabilities: Mapping[int, float] = field(default_factory=dict)
    outdated: Set[int] = frozenset()

    def inverse_probability(self, client: int) -> float:
        """Return the factor on a client's weight."""
        return self.inverse_probabilities.get(client, 1.0)

    def without(self, absent: Collection[int]) -> RoundPlan:
        """Return the plan as if the model had not reached some clients, whose updates did not arrive."""
        if not absent:
            return self
        return replace(self, models={client: model for client, model in self.models.items() if client not in absent})

    @property
    def trainees(self) -> list[int]:
        """The clients that train."""
        return [client for client in self.models if client not in self.lost]

    @property
    def slots(self) -> list[int]:
        """The clients that may be in the cohort, in its order; a channel may substitute a lost update."""
        return [*self.trainees, *self.lost]


@dataclass(frozen=True)
class UpdateRecord:
    """The record of an update that all processes share.

    Attributes:
        update: The update, without its vector and without the state that its client keeps.
        received: Whether the update was received from the client; false for a channel's substitute.
        unnormalized_weight: Its weight before normalization, where the rule declares it.
        rank: The process that holds its vector.
        rms: The root mean square of the received vector, where a channel acts on the sum.
    """

    update: ClientUpdate
    received: bool
    unnormalized_weight: float
    rank: int
    rms: float


@dataclass(frozen=True)
class LocalResults:
    """The results of one process in a round.

    Attributes:
        records: One record per update, in the order of the process's rows.
        excluded: The clients whose update was excluded, with a sentence for each.
        end_state: The state of schedules and loss scale after its clients.
    """

    records: list[UpdateRecord]
    excluded: dict[int, str]
    end_state: EndState


@dataclass(frozen=True)
class Received:
    """The updates that the server has received in a round, from all processes.

    Attributes:
        records: One record per update, in the cohort's order, with the substitutes of channels.
        excluded: The clients whose update was excluded, with a sentence for each.
    """

    records: Sequence[UpdateRecord]
    excluded: Mapping[int, str]

    @property
    def from_clients(self) -> list[UpdateRecord]:
        """The records of updates that were received from their clients, without substitutes."""
        return [record for record in self.records if record.received]

    @property
    def updates(self) -> list[ClientUpdate]:
        """The updates that were received from their clients, without substitutes."""
        return [record.update for record in self.from_clients]


def cohort_of(
    plan: RoundPlan,
    received: Received,
    vectors: CohortVectors,
    learning_rates: tuple[float, ...],
    rule: Rule,
    rate_tangents: CohortVectors | None = None,
    answers: Answers | None = None,
) -> Cohort:
    """Make the cohort that a rule reads.

    Args:
        plan: The plan of the round.
        received: The updates of all processes.
        vectors: Their vectors.
        learning_rates: The local learning rates, where the rule reads them.
        rule: The rule, which says what else it needs.
        rate_tangents: Their rate tangents, where the rule reads them.
        answers: The answers to the rule's inquiry.
    """
    updates = [record.update for record in received.records]
    weights: list[float] = []
    if rule.unnormalized_weight is not None:
        weights = [record.unnormalized_weight for record in received.records]
    losses: list[float] = []
    if rule.needs_initial_loss:
        losses = [update.initial_loss for update in updates]
    return Cohort(
        round=plan.round,
        clients=torch.tensor([update.client for update in updates]),
        num_examples=torch.tensor([update.num_examples for update in updates]),
        num_steps=torch.tensor([update.num_steps for update in updates]),
        received=torch.tensor([record.received for record in received.records]),
        start=plan.start,
        vectors=vectors,
        learning_rates=learning_rates,
        buffers=tuple(update.buffers for update in updates),
        num_batches=torch.tensor([update.num_batches for update in updates]),
        logged=tuple(values_of(update.logged) for update in updates),
        unnormalized_weights=torch.tensor(weights, dtype=torch.float64),
        initial_losses=torch.tensor(losses, dtype=torch.float64),
        lr_scales=factors_of([update.lr_scale for update in updates]),
        inverse_probabilities=factors_of([update.inverse_probability for update in updates]),
        rate_tangents=rate_tangents,
        answers=answers,
    )


@dataclass(frozen=True)
class Aggregation:
    """The result of a round's aggregation.

    Attributes:
        metrics: The rule's and the observers' numbers for the log.
        weights: The normalized weight of each client whose vector reached the aggregation.
        tables: The tables that observers and the evaluation of the clients keep in the history.
    """

    metrics: Mapping[str, float]
    weights: Mapping[int, float]
    tables: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The report of a round, for the log.

    Attributes:
        round: The round's number, from 0.
        clients: The clients that were sampled.
        metrics: The rule's, the observers' and the round's own numbers, with those of the evaluation of the clients.
        logged: The values that the clients' ``training_step`` logged, merged.
        weights: The normalized weight of each client whose vector reached the aggregation.
        tables: The tables that observers and the evaluation of the clients keep in the history.
    """

    round: int
    clients: Sequence[int]
    metrics: Mapping[str, float]
    logged: Mapping[str, Logged]
    weights: Mapping[int, float]
    tables: Mapping[str, Tensor] = field(default_factory=dict)

"""Who comes in a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.streams import stream


class CohortSampler(ABC):
    """Names the clients of a round; the answer depends on the arguments alone, so that a resumed run repeats it."""

    @abstractmethod
    def sample(self, round_idx: int, *, num_clients: int, sizes: Tensor, seed: int) -> list[int]:
        """The cohort of one round.

        Args:
            round_idx: Number of the round, from 0.
            num_clients: N; clients are 0 .. N - 1.
            sizes: Training samples of each client, ``[N]``.
            seed: The federation's seed.

        Returns:
            Distinct client numbers in ascending order.

        Raises:
            ValueError: If the sampler's arguments do not fit the federation.
        """


@dataclass(frozen=True)
class FullParticipationSampler(CohortSampler):
    """All clients, every round."""

    def sample(self, round_idx: int, *, num_clients: int, sizes: Tensor, seed: int) -> list[int]:
        """All clients; see :meth:`CohortSampler.sample`."""
        return list(range(num_clients))


@dataclass(frozen=True)
class UniformSampler(CohortSampler):
    """Each round a fresh random set of clients, all sets alike; McMahan et al. 2017 (FedAvg).

    Attributes:
        clients_per_round: A number of clients, or as a float in (0, 1] a share of them, rounded to the nearest number
            (halves up) and at least one client.

    Raises:
        ValueError: If ``clients_per_round`` is out of range; in ``sample``, if it is more than there are clients.
    """

    clients_per_round: int | float

    def __post_init__(self) -> None:
        per_round = arguments.count_or_share("clients_per_round", self.clients_per_round)
        object.__setattr__(self, "clients_per_round", per_round)

    def sample(self, round_idx: int, *, num_clients: int, sizes: Tensor, seed: int) -> list[int]:
        """A uniform draw without replacement; see :meth:`CohortSampler.sample`."""
        many = _cohort_size(self.clients_per_round, num_clients)
        drawn = torch.randperm(num_clients, generator=stream(seed, "cohort", round_idx))[:many]
        return sorted(drawn.tolist())


@dataclass(frozen=True)
class WeightedSampler(CohortSampler):
    """Each round a random set of clients, drawn one after the other with chances in proportion to their weights.

    Attributes:
        clients_per_round: As for :class:`UniformSampler`.
        weights: Non-negative weight of each client, ``[N]``; weight 0 never comes. Default: the clients' sizes.

    Raises:
        ValueError: If ``clients_per_round`` or a weight is out of range; in ``sample``, if there are not as many
            weights as clients, or fewer positive weights than clients to draw.
    """

    clients_per_round: int | float
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        per_round = arguments.count_or_share("clients_per_round", self.clients_per_round)
        object.__setattr__(self, "clients_per_round", per_round)
        if self.weights is not None:
            weights = arguments.numbers("weights", self.weights, allowed="one finite number of at least 0 per client")
            object.__setattr__(self, "weights", tuple(weights.tolist()))

    def sample(self, round_idx: int, *, num_clients: int, sizes: Tensor, seed: int) -> list[int]:
        """A weighted draw without replacement; see :meth:`CohortSampler.sample`."""
        many = _cohort_size(self.clients_per_round, num_clients)
        weights = torch.as_tensor(sizes if self.weights is None else self.weights, dtype=torch.float64, device="cpu")
        if len(weights) != num_clients:
            raise ValueError(f"`weights` must have one entry per client ({num_clients}), got {len(weights)}.")
        if (weights > 0).sum() < many:
            raise ValueError(
                f"`weights` must be positive for at least the {many} clients of a round, got"
                f" {int((weights > 0).sum())} positive; draw fewer clients."
            )
        drawn = torch.multinomial(weights, many, replacement=False, generator=stream(seed, "cohort", round_idx))
        return sorted(drawn.tolist())


@dataclass(frozen=True)
class FixedSequenceSampler(CohortSampler):
    """Cohorts written down beforehand: round t is visited by ``cohorts[t]``.

    Attributes:
        cohorts: Client numbers of each round; distinct within a round, and at least one.

    Raises:
        ValueError: If a cohort is empty or names a client twice; in ``sample``, if the cohorts have run out or name a
            client that does not exist.
    """

    cohorts: Iterable[Iterable[int]]

    def __post_init__(self) -> None:
        cohorts = [
            _checked_cohort(round_idx, cohort) for round_idx, cohort in enumerate(_list("cohorts", self.cohorts))
        ]
        object.__setattr__(self, "cohorts", tuple(cohorts))

    def sample(self, round_idx: int, *, num_clients: int, sizes: Tensor, seed: int) -> list[int]:
        """The cohort written down for the round; see :meth:`CohortSampler.sample`."""
        cohorts = list(self.cohorts)
        if round_idx >= len(cohorts):
            raise ValueError(
                f"`cohorts` must have an entry for every round, got {len(cohorts)} where round {round_idx} (counted from"
                " 0) is asked for; add cohorts or train fewer rounds."
            )
        cohort = list(cohorts[round_idx])
        if cohort[0] < 0 or cohort[-1] >= num_clients:
            raise ValueError(
                f"`cohorts` must name clients in 0 .. {num_clients - 1}, got {cohort} for round {round_idx}."
            )
        return cohort


def _list(name: str, value: object) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise arguments.invalid(name, "a list of client numbers for each round", value)
    return list(value)


def _checked_cohort(round_idx: int, clients: object) -> tuple[int, ...]:
    cohort = sorted(arguments.integer("cohorts", client, minimum=0) for client in _list("cohorts", clients))
    if not cohort or len(set(cohort)) < len(cohort):
        raise ValueError(
            f"`cohorts` must name at least one client a round and none twice, got {cohort} for round {round_idx}."
        )
    return tuple(cohort)


def _cohort_size(per_round: int | float, num_clients: int) -> int:
    if isinstance(per_round, float):
        return max(1, floor(per_round * num_clients + 0.5))
    if per_round > num_clients:
        raise ValueError(f"`clients_per_round` must be at most the number of clients, {num_clients}, got {per_round}.")
    return per_round

"""Client sampling: which clients participate in a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor

from lightning_fedhaw import argument_names, arguments
from lightning_fedhaw.streams import stream


class CohortSampler(argument_names.NamedArguments, ABC):
    """Base class of the client samplers, which choose the clients of a round.

    The choice depends on the arguments of :meth:`sample` alone, so that a resumed run repeats it.
    """

    @abstractmethod
    def sample(self, round_idx: int, *, num_clients: int, sizes: Tensor, seed: int) -> list[int]:
        """Choose the cohort of one round.

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

    def inverse_probabilities(self, clients: Sequence[int], *, num_clients: int, sizes: Tensor) -> Tensor | None:
        """Return the factors on the clients' weights that make up for unequal chances of being chosen.

        Rules that weigh clients by their examples multiply these weights by them. In expectation over the draw, a sum
        over the chosen clients with these factors is the sum over all clients.

        Args:
            clients: A cohort that :meth:`sample` returned.
            num_clients: N.
            sizes: Training samples of each client, ``[N]``.

        Returns:
            ``[K]`` float64; ``None`` where all clients have the same chance, or where chances are not defined.
        """
        return None


@dataclass(frozen=True)
class FullParticipationSampler(CohortSampler):
    """All clients, every round."""

    def sample(self, round_idx: int, *, num_clients: int, sizes: Tensor, seed: int) -> list[int]:
        """Return all clients; see :meth:`CohortSampler.sample`."""
        return list(range(num_clients))


@dataclass(frozen=True)
class UniformSampler(CohortSampler):
    """Each round a new random set of clients, all sets equally likely; McMahan et al. 2017 (FedAvg).

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
        """Draw a cohort uniformly, without replacement; see :meth:`CohortSampler.sample`."""
        cohort_size = _cohort_size(self.clients_per_round, num_clients)
        order = torch.randperm(num_clients, generator=stream(seed, "cohort", round_idx))
        return sorted(order[:cohort_size].tolist())


@dataclass(frozen=True)
class WeightedSampler(CohortSampler):
    """Each round a random set of clients, drawn one after the other with probabilities in proportion to their weights.

    A rule that also weighs by examples would count sizes twice. So it divides by the probabilities, with the factors of
    M. N. Murthy: Ordered and Unordered Estimators in Sampling without Replacement. Sankhya 18, 1957. With weights that
    are the clients' sizes, the expected weight of a client is its share of all examples.

    Attributes:
        clients_per_round: As for :class:`UniformSampler`.
        weights: Non-negative weight of each client, ``[N]``; a client of weight 0 is never drawn. Default: the
            clients' sizes.

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
        """Draw a cohort by weight, without replacement; see :meth:`CohortSampler.sample`."""
        cohort_size = _cohort_size(self.clients_per_round, num_clients)
        weights = self._weights(num_clients, sizes)
        num_positive = int((weights > 0).sum())
        if num_positive < cohort_size:
            raise ValueError(
                f"`weights` must be positive for at least the {cohort_size} clients of a round, got"
                f" {num_positive} positive; draw fewer clients."
            )
        generator = stream(seed, "cohort", round_idx)
        clients = torch.multinomial(weights, cohort_size, replacement=False, generator=generator)
        return sorted(clients.tolist())

    def inverse_probabilities(self, clients: Sequence[int], *, num_clients: int, sizes: Tensor) -> Tensor | None:
        """Return Murthy's factors ``P(S | k is drawn first) / P(S)`` of the clients k in the cohort S.

        See :meth:`CohortSampler.inverse_probabilities`. Their expectation is 1 for every client of positive weight.
        """
        probabilities = self._weights(num_clients, sizes)
        probabilities = probabilities / probabilities.sum()
        chosen = probabilities[list(clients)]
        probability_of_others = float(probabilities.sum() - chosen.sum())
        if probability_of_others < 1e-12:
            # All clients of positive weight were drawn, as they are in every round; not 0, because sums are rounded.
            return torch.ones_like(chosen)
        # Drawing without replacement is a race of clocks that ring at the rates p_k: S are those that rang before the
        # first of the others, which rings at the rate R. So P(S) is the integral of R exp(-R t) times the product of
        # 1 - exp(-p_j t) over S, and with k drawn first the factor of k is absent. With the logarithm of R t as the
        # variable, both integrands are smooth and decay at both ends, where the trapezoidal rule is exact to rounding.
        time = torch.linspace(-40.0, 4.2, 1000, dtype=torch.float64).exp()
        rung = -torch.expm1(-time[:, None] * (chosen / probability_of_others))  # [times, K]
        density = torch.softmax(time.log() - time + rung.log().sum(dim=1), dim=0)  # [times]
        return density @ rung.reciprocal()

    def _weights(self, num_clients: int, sizes: Tensor) -> Tensor:
        """Return the weight of each client, ``[N]`` float64."""
        weights = torch.as_tensor(sizes, dtype=torch.float64, device="cpu")
        if self.weights is not None:
            weights = torch.tensor(self.weights, dtype=torch.float64)
        if len(weights) != num_clients:
            raise ValueError(f"`weights` must have one entry per client ({num_clients}), got {len(weights)}.")
        return weights


@dataclass(frozen=True)
class FixedSequenceSampler(CohortSampler):
    """Cohorts that are listed in advance: ``cohorts[t]`` participates in round t.

    Attributes:
        cohorts: Client numbers of each round; distinct within a round, and at least one.

    Raises:
        ValueError: If a cohort is empty or names a client twice; in ``sample``, if there is no cohort for the round, or
            it names a client that does not exist.
    """

    cohorts: Iterable[Iterable[int]]

    def __post_init__(self) -> None:
        cohorts = []
        for round_idx, cohort in enumerate(_checked_list(self.cohorts)):
            cohorts.append(_checked_cohort(round_idx, cohort))
        object.__setattr__(self, "cohorts", tuple(cohorts))

    def sample(self, round_idx: int, *, num_clients: int, sizes: Tensor, seed: int) -> list[int]:
        """Return the cohort that is listed for the round; see :meth:`CohortSampler.sample`."""
        cohorts = list(self.cohorts)
        if round_idx >= len(cohorts):
            raise ValueError(
                f"`cohorts` must have an entry for every round, got {len(cohorts)} where round {round_idx} (counted"
                " from 0) is asked for; add cohorts or train fewer rounds."
            )
        cohort = list(cohorts[round_idx])
        # The cohort is in ascending order, so that its two ends tell.
        if cohort[0] < 0 or cohort[-1] >= num_clients:
            raise ValueError(
                f"`cohorts` must name clients in 0 .. {num_clients - 1}, got {cohort} for round {round_idx}."
            )
        return cohort


def _checked_list(value: object) -> list[object]:
    """Convert ``cohorts``, or the cohort of one round, to a list; refuse what is none."""
    allowed = "a list of client numbers for each round"
    if isinstance(value, str):
        raise arguments.invalid("cohorts", allowed, value)
    try:
        return arguments.plain_list(value)
    except TypeError:
        # Not iterable, such as a tensor without axes.
        raise arguments.invalid("cohorts", allowed, value) from None


def _checked_cohort(round_idx: int, clients: object) -> tuple[int, ...]:
    """Convert a cohort to client numbers in ascending order; refuse an empty one, and duplicates."""
    cohort = sorted(arguments.integer("cohorts", client, minimum=0) for client in _checked_list(clients))
    if not cohort or len(set(cohort)) < len(cohort):
        raise ValueError(
            f"`cohorts` must name at least one client a round and none twice, got {cohort} for round {round_idx}."
        )
    return tuple(cohort)


def _cohort_size(per_round: int | float, num_clients: int) -> int:
    """Return the number of clients of a round, which ``clients_per_round`` gives as a number or a share.

    Raises:
        ValueError: If it is more than there are clients.
    """
    if isinstance(per_round, float):
        # Not `round`, which would round halves to even: 0.5 of 5 clients would be 2, and 0.5 of 7 would be 4.
        return max(1, floor(per_round * num_clients + 0.5))
    if per_round > num_clients:
        raise ValueError(f"`clients_per_round` must be at most the number of clients, {num_clients}, got {per_round}.")
    return per_round

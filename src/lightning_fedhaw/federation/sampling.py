"""Which clients take part in a round."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.data.samplers import CohortSampler, FullParticipationSampler, UniformSampler


class Sampling:
    """The draw of the clients of each round.

    Args:
        sampler: How they are sampled.
        data: The clients' data.
        seed: The federation's seed.
        cohort_cap: Clients a round at most, for a development run.
    """

    def __init__(self, sampler: CohortSampler, data: ClientData, seed: int, cohort_cap: int | None) -> None:
        self.sampler = sampler
        self.data = data
        self.seed = seed
        self.cohort_cap = cohort_cap

    def cohort(self, round_idx: int) -> list[int]:
        """Draw the clients of a round.

        Raises:
            ValueError: If the sampler names a client twice, or one that does not exist.
        """
        count = self.data.num_clients
        sampled = self.sampler.sample(round_idx, num_clients=count, sizes=self.data.num_examples, seed=self.seed)
        # In ascending order, so that sums over clients do not depend on the sampler's order.
        clients = sorted(int(client) for client in sampled)
        if len(set(clients)) != len(clients) or any(not 0 <= client < count for client in clients):
            raise ValueError(
                f"`sampler` ({type(self.sampler).__name__}) must name distinct clients of 0 to {count - 1}, got"
                f" {clients} for round {round_idx}."
            )
        return clients[: self.cohort_cap]

    def inverse_probabilities(self, clients: Sequence[int]) -> dict[int, float]:
        """Return the factor on each client's weight where chances are unequal; empty where they are equal.

        Args:
            clients: The cohort.
        """
        if self.cohort_cap is not None or not hasattr(self.sampler, "inverse_probabilities"):
            return {}
        sizes = self.data.num_examples
        factors = self.sampler.inverse_probabilities(clients, num_clients=self.data.num_clients, sizes=sizes)
        if factors is None:
            return {}
        return dict(zip(clients, factors.tolist(), strict=True))

    def uniform_cohort_size(self) -> int | None:
        """Return the size of a cohort, if all sets of that size are equally likely; else ``None``."""
        # A class derived from these may sample in another way.
        draws_uniformly = type(self.sampler) in (FullParticipationSampler, UniformSampler)
        if not draws_uniformly or self.cohort_cap is not None:
            return None
        return len(self.cohort(0))

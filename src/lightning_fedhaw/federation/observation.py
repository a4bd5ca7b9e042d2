"""What observers measure of an aggregation: numbers for the log, and tables for the history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.rule import RuleOutput
from lightning_fedhaw.server import Server
from lightning_fedhaw.streams import seed_of
from lightning_fedhaw.vectors.accumulated import AccumulatedVectors

Value = TypeVar("Value")

PREFIX = "diagnostics/"
"""The first part of the name of everything that observers measure. It may be measured in some rounds only."""


@dataclass(frozen=True)
class Aggregated:
    """An aggregation that is over, for observers, which may log numbers of it.

    Nothing in it may be changed. Its vectors are only valid during the call, because their memory is used again.

    Attributes:
        cohort: The updates that the rule has read.
        output: What the rule returned: the new parameters, the weights of the clients, its own numbers.
        server: The new global model, with a loss that is differentiable in its parameters.
        numbers: The numbers that were logged, by their full names.
        tables: The tables that were kept, by their full names.
    """

    cohort: Cohort
    output: RuleOutput
    server: Server
    numbers: dict[str, float] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)

    @property
    def round(self) -> int:
        """The round's number, from 0."""
        return self.cohort.round

    @property
    def weights(self) -> Tensor:
        """``[K]`` float64 on the CPU, the weights of the clients, which sum to one."""
        return self.output.weights.detach().double().cpu()

    def mean_update(self) -> Tensor:
        """Compute the weighted mean ``[P]`` of the clients' displacements from the model that was broadcast."""
        displacements = self.cohort.vectors.displacements
        if isinstance(displacements, AccumulatedVectors):
            # The weights of a running sum itself, from which those of the rule may differ by rounding.
            return displacements.weighted_sum(displacements.weights)
        return displacements.weighted_sum(self.output.weights.detach())

    def log(self, name: str, value: float) -> None:
        """Log a number of this round, as ``diagnostics/`` and its name; it is in the history and in the loggers.

        Args:
            name: The name, without the prefix.
            value: The number; NaN where it is undefined.

        Raises:
            ValueError: If another observer has logged this name.
        """
        _add(self.numbers, name, float(value))

    def keep(self, name: str, table: Tensor) -> None:
        """Keep a table of this round in the history, as ``diagnostics/`` and its name.

        Args:
            name: The name, without the prefix.
            table: The numbers. They become part of checkpoints, so there should be few; float32 on the CPU.

        Raises:
            ValueError: If another observer has kept this name.
        """
        _add(self.tables, name, table.detach().float().cpu().clone())


def _add(entries: dict[str, Value], name: str, value: Value) -> None:
    """Add an entry under a name of its own."""
    full_name = f"{PREFIX}{name}"
    if full_name in entries:
        raise ValueError(f"Two observers measure {full_name!r}. Remove one, or give the names of one a prefix.")
    entries[full_name] = value


class Observation:
    """The observers of aggregations, which change no random numbers of the run.

    Args:
        host: The trainer around the federation.
        server: The global model.
        seed: The federation's seed.

    Attributes:
        observe: Called with each aggregation; ``None`` if nobody observes.
    """

    def __init__(self, host: Host, server: Server, seed: int) -> None:
        self.host = host
        self.server = server
        self.seed = seed
        self.observe: Callable[[Aggregated], None] | None = None

    def of(self, cohort: Cohort, output: RuleOutput) -> Aggregated:
        """Let the observers measure an aggregation whose model is installed."""
        aggregated = Aggregated(cohort, output, self.server)
        if self.observe is not None:
            with isolated_randomness(self.host.device):
                seed_randomness(seed_of(self.seed, "round", cohort.round, "observers"), self.host.device)
                self.observe(aggregated)
        return aggregated

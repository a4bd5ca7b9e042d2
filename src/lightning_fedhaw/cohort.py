"""The results of a round that reach the server, as frozen records.

Shapes: N is the number of clients, K the number of clients in the cohort, P the number of trainable parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.inquiry import Answers
from lightning_fedhaw.vectors.base import CohortVectors


@dataclass(frozen=True)
class ClientUpdate:
    """The result of one client's local training in one round.

    Attributes:
        client: The client's number, from 0 to N-1.
        num_examples: The number of the client's training examples.
        num_steps: The number of optimizer steps that changed parameters.
        num_skipped: The number of steps that were skipped (loss-scale overflow, or ``training_step`` returned
            ``None``).
        displacement: ``[P]``, the client's model minus the model it received.
        buffers: The client's buffers after training, by name.
        logged: The values that its ``training_step`` logged, merged over its steps.
        memory: The state that the client keeps for its next round if the update is received: a kept optimizer state,
            and the states of client objectives.
        num_batches: The number of batches in one pass over its training examples.
        initial_loss: The mean loss of its training examples at the model it received; NaN unless the rule asks for it.
        lr_scale: The client's own factor on the learning rates, as ``client_lr_scale`` gives it.
        inverse_probability: The factor on its weight that makes up for its chance of being sampled.
    """

    client: int
    num_examples: int
    num_steps: int
    num_skipped: int
    displacement: Tensor
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    logged: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    num_batches: int = 0
    initial_loss: float = math.nan
    lr_scale: float = 1.0
    inverse_probability: float = 1.0

    @property
    def example_weight(self) -> float:
        """The client's weight by examples before normalization: their number, times the inverse probability."""
        return self.num_examples * self.inverse_probability


def factors_of(factors: Sequence[float]) -> Tensor | None:
    """Return the clients' factors ``[K]`` in float64; ``None`` if all are 1."""
    if all(factor == 1.0 for factor in factors):
        return None
    return torch.tensor(factors, dtype=torch.float64)


@dataclass(frozen=True)
class Cohort:
    """The updates that an aggregation rule receives in one round.

    Clients that are left out of the round are not in the cohort, so a rule needs no mask. A client whose update was not
    received and for which a channel provided a substitute is in the cohort, with ``received`` false.

    Attributes:
        round: The round's number, from 0.
        clients: ``[K]`` int64, the clients' numbers.
        num_examples: ``[K]`` int64, the number of training examples of each client.
        num_steps: ``[K]`` int64, the number of optimizer steps of each client in this round.
        received: ``[K]`` bool, whether the update was received; false for a substitute.
        start: ``[P]``, the global parameters that were broadcast.
        vectors: The clients' parameter vectors as the server received them.
        learning_rates: The round's local learning rate of each parameter tensor, in the layout's order.
        buffers: Each client's buffers after training, by name; unchanged ones may be missing.
        num_batches: ``[K]`` int64, the number of batches in one pass over each client's training examples.
        unnormalized_weights: ``[K]`` float64, what the rule's ``unnormalized_weight`` returned for each client; empty
            if the rule has none.
        logged: For each client, the numbers that its ``training_step`` logged, by name, merged over its steps. Empty
            for a substitute. A logged torchmetrics object is not among them: it is pooled over all clients.
        initial_losses: ``[K]`` float64, the mean loss of each client's training examples at the model it received; NaN
            for a substitute. Empty unless the rule sets ``needs_initial_loss``.
        lr_scales: ``[K]`` float64, each client's own factor on the learning rates; ``None`` if all are 1.
        inverse_probabilities: ``[K]`` float64, the factors on the clients' weights that make up for unequal chances of
            being sampled; ``None`` if the chances are equal.
        rate_tangents: The derivatives of the clients' displacements in the factor on their learning rates; ``None``
            unless the rule sets ``needs_rate_tangents``.
        answers: The clients' answers to the rule's inquiry; ``None`` if it made none or nobody answered.
    """

    round: int
    clients: Tensor
    num_examples: Tensor
    num_steps: Tensor
    received: Tensor
    start: Tensor
    vectors: CohortVectors
    learning_rates: tuple[float, ...] = ()
    buffers: Sequence[Mapping[str, Tensor]] = ()
    num_batches: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    unnormalized_weights: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    logged: Sequence[Mapping[str, float]] = ()
    initial_losses: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    lr_scales: Tensor | None = None
    inverse_probabilities: Tensor | None = None
    rate_tangents: CohortVectors | None = None
    answers: Answers | None = None

    @property
    def example_weights(self) -> Tensor:
        """``[K]``, the clients' weights by examples before normalization; see :class:`ClientUpdate`."""
        if self.inverse_probabilities is None:
            return self.num_examples
        return self.num_examples * self.inverse_probabilities

    def __len__(self) -> int:
        return len(self.clients)

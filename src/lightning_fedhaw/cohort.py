"""What a round brings to the server, as frozen records.

Shapes: N clients exist, K of them are in the cohort, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw.vectors.base import CohortVectors


@dataclass(frozen=True)
class ClientUpdate:
    """What one client did in one round.

    Attributes:
        client: The client's number, 0 to N-1.
        num_examples: Training examples the client holds.
        num_steps: Optimizer steps that changed parameters.
        num_skipped: Steps that were tried and skipped (a loss-scale overflow, a ``training_step`` that gave ``None``).
        displacement: ``[P]``, the client's model minus the model it received.
        buffers: The client's buffers after training, by name.
        logged: What its ``training_step`` logged, merged over its steps.
        memory: What it would find again next time (kept optimizer state, objectives' state), if the update is received.
        num_batches: Batches in a pass over its training examples.
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


@dataclass(frozen=True)
class Cohort:
    """What reached the server in one round.

    Clients that did not arrive are not in here, so a rule needs no mask. A slot that a channel filled in for a client
    whose update was not received is here with ``received`` false.

    Attributes:
        round: The round's number, from 0.
        clients: ``[K]`` int64, client numbers.
        num_examples: ``[K]`` int64, training examples each holds.
        num_steps: ``[K]`` int64, optimizer steps each made this round.
        received: ``[K]`` bool, whether the message really came from the client.
        start: ``[P]``, the global parameters that were broadcast.
        vectors: The clients' parameter vectors as the server received them.
        learning_rates: The round's local learning rate of each parameter tensor, in the layout's order.
        buffers: Each client's buffers after training, by name; those that did not change may be missing.
        num_batches: ``[K]`` int64, batches in a pass over each one's training examples.
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

    def __len__(self) -> int:
        return len(self.clients)

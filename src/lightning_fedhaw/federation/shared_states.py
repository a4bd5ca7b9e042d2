"""The states that client objectives share with the server, such as SCAFFOLD's control variates."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor

from lightning_fedhaw.channel.base import Link
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.federation.context import RunContext
from lightning_fedhaw.federation.records import UpdateRecord
from lightning_fedhaw.federation.stores import VectorStore, make_sum
from lightning_fedhaw.objectives.base import ClientObjective, ClientState

SHARED_CHANGES = "changes of shared states"
"""The entry of an update's memory with the changes of shared states, where the client is not in this process."""


class SharedStates:
    """The exchange of states: their means are sent with the model, and their changes are received with the updates.

    The means themselves are stored by the objectives.

    Args:
        context: What all steps of a round work with.
        objectives: All client objectives of the run, from which those that share a state are selected.
    """

    def __init__(self, context: RunContext, objectives: Sequence[ClientObjective]) -> None:
        self.objectives = objectives
        self.sharing = [objective for objective in objectives if objective.shares_state]
        self.layout = context.server.layout
        self.num_clients = context.data.num_clients
        self.rule = context.rule
        self.options = context.options
        self.ranks = context.ranks

    @property
    def links(self) -> Sequence[Link]:
        """Both links."""
        return ("downlink", "uplink")

    @property
    def message_bytes(self) -> int:
        """Bytes of shared states in addition to a model, on either link: each is as large as the model."""
        return len(self.sharing) * self.layout.message_bytes

    @property
    def contents(self) -> list[str]:
        """The kinds of data that clients send, in words."""
        return [type(objective).__name__ for objective in self.sharing]

    def record_broadcast(self, clients: Set[int]) -> None:
        """Let clients keep the means that they received with the model."""
        for objective in self.sharing:
            objective.record_broadcast(clients)

    def make_stores(self, start: Tensor, capacity: int) -> list[VectorStore]:
        """Make a store for the changes of each shared state in a round.

        Args:
            start: ``[P]``, the model that is broadcast.
            capacity: Updates of this process at most.
        """
        return [make_sum(self.rule, self.options, start, capacity, self.ranks) for _ in self.sharing]

    def collect(self, update: ClientUpdate, stores: Sequence[VectorStore]) -> None:
        """Store the changes of a client's states, which it sends with its update."""
        for change, store in zip(self.changes(update), stores, strict=True):
            # States of parameters that the objective leaves out have not changed.
            vector = torch.zeros_like(update.displacement)
            views = self.layout.views(vector)
            for name, value in change.items():
                views[name].copy_(value)
            store.commit(replace(update, displacement=vector), 1.0)

    def changes(self, update: ClientUpdate) -> list[ClientState]:
        """Return the change of each shared state, by parameter: as the client sent it, or from the client's states."""
        if SHARED_CHANGES in update.memory:
            sent: list[ClientState] = update.memory[SHARED_CHANGES]
            return sent
        states = dict(zip(self.objectives, update.memory["objectives"], strict=True))
        return [objective.change(update.client, states[objective]) for objective in self.sharing]

    def aggregate(self, start: Tensor, stores: Sequence[VectorStore], records: Sequence[UpdateRecord]) -> None:
        """Add the changes that were received to the means of all N clients' states.

        Args:
            start: ``[P]``, the model that was broadcast.
            stores: The stores of the changes.
            records: The updates that were received from their clients.
        """
        if not records or not self.sharing:
            return
        unweighted = [replace(record, unnormalized_weight=1.0) for record in records]
        # The states of clients that sent nothing are unchanged, so each change has the weight 1/N.
        weights = torch.full((len(records),), 1 / self.num_clients, dtype=torch.float64)
        for objective, store in zip(self.sharing, stores, strict=True):
            change = store.vectors(start, unweighted).displacements.weighted_sum(weights)
            objective.aggregate_states(self.layout.views(change.to(start)))

"""The placement of clients on processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.ranks import Ranks, assign
from lightning_fedhaw.vectors.layout import ParameterLayout


class Placement:
    """The assignment of clients to processes.

    Args:
        ranks: The processes.
        is_sticky: Whether clients keep state on their process, so that they have to return to it.

    Attributes:
        process_of: The process of each client: of those of the round, and with ``is_sticky`` of all earlier ones.
    """

    def __init__(self, ranks: Ranks, *, is_sticky: bool) -> None:
        self.ranks = ranks
        self.is_sticky = is_sticky
        self.process_of: dict[int, int] = {}

    def assign(self, clients: Sequence[int], cost: Callable[[int], float]) -> list[int]:
        """Assign the clients of a round: the most expensive first, each to the process with the least work.

        Args:
            clients: The clients.
            cost: Estimates the cost of a client's training, in any unit.

        Returns:
            The clients of this process, in their order.
        """
        if self.ranks.size == 1:
            self.process_of = dict.fromkeys(clients, 0)
            return list(clients)
        known = self.process_of if self.is_sticky else {}
        fixed = {}
        for position, client in enumerate(clients):
            if client in known:
                fixed[position] = known[client]
        processes = assign([cost(client) for client in clients], self.ranks.size, fixed)
        self.process_of = {**known, **dict(zip(clients, processes, strict=True))}
        return [client for client in clients if self.process_of[client] == self.ranks.rank]

    def state_dict(self) -> dict[str, Any]:
        """Return the processes of the clients for a checkpoint, because sums in one process have another rounding.

        It is empty where rounds do not depend on earlier ones.
        """
        if self.ranks.size == 1 or not self.is_sticky:
            return {}
        return {"processes": self.ranks.size, "process_of": dict(self.process_of)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let clients return to their processes; after a run on another number of processes, all are free.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self.process_of = {}
        if state.get("processes") == self.ranks.size:
            self.process_of = dict(state["process_of"])

    def merged(self, memories: Sequence[Any]) -> Any:
        """Merge the state that processes keep for clients: each client's entry is that of its process.

        Args:
            memories: One memory per process: a dictionary by client or ``None``. Of anything else, which is equal on
                all processes, the first is returned.
        """
        if not all(isinstance(memory, (dict, type(None))) for memory in memories):
            return memories[0]
        clients: set[int] = set()
        for memory in memories:
            clients.update(memory or {})
        merged = {}
        for client in sorted(clients):
            # A client that has not trained since a checkpoint was loaded is the same on all processes.
            memory = memories[self.process_of.get(client, 0)] or {}
            if memory.get(client) is not None:
                merged[client] = memory[client]
        return merged


def do_clients_remember(
    options: FederationOptions,
    buffers: Buffers,
    layout: ParameterLayout,
    uplink: Sequence[Channel],
    objectives: Sequence[ClientObjective],
) -> bool:
    """Return whether clients keep any state from round to round."""
    return (
        options.optimizer_state == "kept"
        or buffers.remembers
        or bool(layout.local)
        or any(channel.remembers for channel in uplink)
        or any(objective.remembers for objective in objectives)
    )

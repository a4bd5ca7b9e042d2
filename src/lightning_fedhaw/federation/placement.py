"""The placement of clients on processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_fedhaw.ranks import Ranks, assign


class Placement:
    """Says which process trains which client.

    Args:
        ranks: The processes.
        is_sticky: Whether clients leave something behind on their process, so that they have to come back to it.

    Attributes:
        process_of: The process of each client: of the round's, and with ``is_sticky`` of all that ever took part.
    """

    def __init__(self, ranks: Ranks, *, is_sticky: bool) -> None:
        self.ranks = ranks
        self.is_sticky = is_sticky
        self.process_of: dict[int, int] = {}

    def assign(self, clients: Sequence[int], cost: Callable[[int], float]) -> list[int]:
        """Distribute the clients of a round: those with most to do first, each to the process with the least to do.

        Args:
            clients: The clients.
            cost: What a client's training is estimated to cost, in any unit.

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

    def merged(self, memories: Sequence[Any]) -> Any:
        """Merge what the processes remember: each client's entry is that of the process which trained it last.

        Args:
            memories: One memory per process: a dictionary by client or ``None``; of anything else, which all processes
                have alike, the first is taken.
        """
        if not all(isinstance(memory, (dict, type(None))) for memory in memories):
            return memories[0]
        clients = {client for memory in memories for client in memory or {}}
        merged = {}
        for client in sorted(clients):
            # A client that has not been back since a checkpoint was loaded is the same everywhere.
            memory = memories[self.process_of.get(client, 0)] or {}
            if memory.get(client) is not None:
                merged[client] = memory[client]
        return merged

"""The buffers that stay with the clients: each client has its own from its first update on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.vectors.memory import HOST


class LocalBuffers:
    """The clients' own buffers between their rounds, in host memory.

    Args:
        names: The names of the buffers that clients keep.
        is_in_use: Whether clients are to keep buffers, even if the module has none of them.

    Attributes:
        of_clients: The buffers of each client whose update was received, by name. Entries are replaced and never
            changed in place, because the undo of a round holds the dictionaries themselves.
    """

    def __init__(self, names: frozenset[str], *, is_in_use: bool) -> None:
        self.names = names
        self.is_in_use = is_in_use
        self.of_clients: dict[int, dict[str, Tensor]] = {}

    def start(self, client: int) -> Mapping[str, Tensor]:
        """Return the buffers that a client has instead of the server's."""
        return self.of_clients.get(client, {})

    def commit(self, update: ClientUpdate) -> None:
        """Keep the buffers of a client whose update was received, for its next round."""
        if not self.is_in_use:
            return
        own = self._kept(update.buffers)
        self.of_clients[update.client] = {name: buffer.to(HOST) for name, buffer in own.items()}

    def forget(self, names: Sequence[str]) -> None:
        """Let all clients start from the server's buffers with these names, where they have kept their own."""
        if not names:
            return
        for client, own in self.of_clients.items():
            remaining = dict(own)
            for name in names:
                remaining.pop(name, None)
            self.of_clients[client] = remaining

    def load(self, of_clients: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Load the clients' buffers from a checkpoint, except those that are frozen or not local by now."""
        self.of_clients = {client: self._kept(buffers) for client, buffers in of_clients.items()}

    def _kept(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pick the buffers that clients keep."""
        return {name: buffer for name, buffer in buffers.items() if name in self.names}

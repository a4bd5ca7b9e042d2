"""The parameters that stay with the clients: each client trains its own, and none of them is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.server import Server
from lightning_fedhaw.vectors.memory import HOST

LOCAL_PARAMETERS = "local parameters"
"""The entry of an update's memory with the client's own parameters after training."""

NamedTensors = dict[str, Tensor]


class LocalParameters:
    """The clients' own parameters between their rounds, in host memory.

    Args:
        server: The global model. A client that has not trained yet starts from its values.

    Attributes:
        of_clients: The values of each client whose update was received, by name of the parameter. Entries are replaced
            and never changed in place.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.of_clients: dict[int, NamedTensors] = {}

    def start(self, client: int) -> Mapping[str, Tensor]:
        """Return the values that a client starts from."""
        return self.of_clients.get(client, self.server.local_parameters)

    def commit(self, update: ClientUpdate) -> None:
        """Keep the values of a client whose update was received, for its next round."""
        if self.server.local_parameters:
            self.of_clients[update.client] = update.memory[LOCAL_PARAMETERS]


def in_host_memory(named: Iterable[tuple[str, Tensor]]) -> NamedTensors:
    """Copy named tensors to host memory."""
    return {name: value.detach().to(HOST, copy=True) for name, value in named}

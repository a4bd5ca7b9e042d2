"""The sites as the server sees them, through any engine; and in memory, for trials without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

from lightning_fedhaw import arguments
from lightning_fedhaw.deploy.client_side import ClientSide
from lightning_fedhaw.deploy.messages import Message

Task = Literal["query", "train", "evaluate"]
"""What a site is asked to do."""


class Sites(Protocol):
    """What the server asks of an engine: who is there, and to carry messages."""

    def present(self) -> Mapping[str, str]:
        """Return the addresses of the sites that are connected now, with the identity that the engine vouches for.

        An identity is empty where the engine knows none; then it is the name that the site gives itself.
        """

    def ask(self, task: Task, messages: Mapping[str, Message], timeout: float) -> Iterator[tuple[str, Message]]:
        """Send messages, and yield the replies in the order of the messages, one at a time.

        A site that does not reply in time is left out. One that fails replies with an error.

        Args:
            task: What is asked for.
            messages: A message for each address.
            timeout: Seconds from now until which replies are waited for.
        """


class InMemorySites:
    """Sites in this process, one after another: a deployment without an engine, for trials and tests.

    Args:
        clients: The client side of each site, by its address.

    Attributes:
        memories: What each site has kept, by its address.
    """

    def __init__(self, clients: Mapping[str, ClientSide]) -> None:
        self.clients: dict[str, ClientSide] = {}
        for address, client in clients.items():
            self.clients[address] = arguments.instance("clients", client, ClientSide, example='{"a": ClientSide(...)}')
        self.memories: dict[str, bytes] = {}

    def present(self) -> dict[str, str]:
        """Return the addresses; nobody vouches for names."""
        return dict.fromkeys(self.clients, "")

    def ask(self, task: Task, messages: Mapping[str, Message], timeout: float) -> Iterator[tuple[str, Message]]:
        """Let the sites answer, in the order of the messages."""
        for address, message in messages.items():
            if address not in self.clients:
                continue
            reply, memory = self.clients[address].answer(task, message, self.memories.get(address))
            if memory is not None:
                self.memories[address] = memory
            yield address, reply

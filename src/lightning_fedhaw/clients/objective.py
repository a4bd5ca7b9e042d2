"""What a client adds to its own loss: the base of every client objective."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

ClientState = dict[str, Tensor]


class ClientObjective(Callback):
    """A term that clients add to the loss of their ``training_step``. Several add up.

    A new objective implements :meth:`penalty`; one that remembers something per client also :meth:`init_client` and
    :meth:`end_client`. All are pure. State exists only for clients that took part, and is checkpointed.

    Args:
        name: Tells two objectives of one class apart in a checkpoint.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name
        self._states: dict[int, ClientState] = {}

    @property
    def state_key(self) -> str:
        """Class and name: Lightning keeps one state per key."""
        return "/".join(filter(None, (type(self).__qualname__, self.name)))

    @abstractmethod
    def penalty(self, parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], state: ClientState) -> Tensor:
        """The term, differentiable in the parameters.

        Stated on named tensors with free leading axes, so that it serves one client and a stack of clients alike:
        reduce over each parameter's own axes only.

        Args:
            parameters: The local model's trainable parameters, each ``[..., *shape]``.
            start: The model the client started the round from, each ``[..., *shape]``.
            state: The client's state, each ``[..., *shape]``.

        Returns:
            ``[...]``, a scalar for one client.
        """

    def init_client(self, start: Mapping[str, Tensor]) -> ClientState:
        """A client's state when it takes part for the first time."""
        return {}

    def end_client(
        self, state: ClientState, start: Mapping[str, Tensor], end: Mapping[str, Tensor], num_steps: int
    ) -> ClientState:
        """A client's state after a round of local work.

        Args:
            state: The state before.
            start: The model it started from.
            end: The model it ended with.
            num_steps: Its optimiser steps.
        """
        return state

    def client_state(self, client: int, start: Mapping[str, Tensor]) -> ClientState:
        """The state of a client, made when it is first asked for."""
        return self._states[client] if client in self._states else self.init_client(start)

    def keep_client_state(self, client: int, state: ClientState) -> None:
        """Keep a copy of a client's state, in host memory."""
        if state:
            self._states[client] = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    def reset(self) -> None:
        """Forget what another run left behind."""
        self._states = {}

    def state_dict(self) -> dict[str, Any]:
        """The clients' states, for a checkpoint."""
        return {"clients": dict(self._states)} if self._states else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the clients' states of a checkpoint."""
        self._states = dict(state_dict.get("clients", {}))

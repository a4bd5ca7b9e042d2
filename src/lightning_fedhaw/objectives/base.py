"""What a client adds to its own loss: the base of every client objective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.keys import KeyedCallback

ClientState = dict[str, Tensor]
Named = Mapping[str, Tensor]

GRADIENT = "gradient of "
"""Before a parameter's name: its gradient, in the state of an objective that asks for it."""


class ClientObjective(KeyedCallback):
    """A term that clients add to the loss of their ``training_step``. Several add up.

    A new objective implements :meth:`penalty`, or :meth:`gradient` where its closed form is known, which costs a
    fraction of what differentiating the term does. One that remembers something per client also implements
    :meth:`init_client` and :meth:`end_client`. All are pure, and all are given the tensors of one client, whichever
    engine trains it. State exists only for clients whose update was received, in host memory, and is checkpointed.

    Args:
        name: Tells two objectives of one class apart in a checkpoint.

    Attributes:
        mean: With ``shares_state``, the mean of all N clients' states, on the server; empty until an update was
            received. What of it a client knows is :meth:`broadcast_mean`.
    """

    key = "ClientObjective"

    proximal: float = 0.0
    """The factor of ``|w - start|^2 / 2`` in the term, which shortens the way of a local optimizer."""

    shares_state: bool = False
    """Whether the server knows the mean of all clients' states. It is sent down with the model, and the change of a
    client's state up with its update: one more model each way. States then begin at zero and have one tensor per
    parameter, under its name."""

    needs_learning_rates: bool = False
    """Whether the term divides by the clients' learning rates, which have to be known then."""

    needs_gradient: bool = False
    """Whether :meth:`end_client` finds the gradient of the client's mean loss at ``start`` in its state, under the
    parameters' names after ``GRADIENT``; that is one more pass over the client's data."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = arguments.optional(arguments.text, "name", name)
        self._states: dict[int, ClientState] = {}
        self.mean: ClientState = {}
        self._broadcast_means: dict[int, ClientState] = {}

    @property
    def state_key(self) -> str:
        """Key and name: Lightning keeps one state per key."""
        return "/".join(filter(None, (type(self).key, self.name)))

    @property
    def is_closed(self) -> bool:
        """Whether the gradient of the term is known in closed form."""
        return type(self).gradient is not ClientObjective.gradient

    @property
    def remembers(self) -> bool:
        """Whether clients have a state."""
        return any(
            getattr(type(self), hook) is not getattr(ClientObjective, hook) for hook in ("init_client", "end_client")
        )

    def penalty(self, parameters: Named, start: Named, state: ClientState) -> Tensor:
        """The term, differentiable in the parameters. Its value is not looked at, only its gradient.

        Args:
            parameters: The local model's trainable parameters, by name.
            start: The model the client started the round from.
            state: The client's state.

        Returns:
            A scalar.
        """
        slopes = self.gradient({name: value.detach() for name, value in parameters.items()}, start, state)
        return torch.stack([(parameters[name] * slope).sum() for name, slope in slopes.items()]).sum()

    def gradient(self, parameters: Named, start: Named, state: ClientState) -> Named:
        """The gradient of the term, for every parameter by its name; called without autograd.

        Args:
            parameters: As in :meth:`penalty`, like the two that follow.
            start: As there.
            state: As there.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must implement `penalty` or `gradient`.")

    def init_client(self, start: Named) -> ClientState:
        """A client's state when it takes part for the first time."""
        return {}

    def end_client(self, state: ClientState, start: Named, end: Named, num_steps: int) -> ClientState:
        """A client's state after a round of local work; empty, if the one that is kept shall stay.

        Args:
            state: The state it worked with.
            start: The model it started from.
            end: The model it ended with.
            num_steps: Its optimizer steps.
        """
        return state

    def client_state(self, client: int, start: Named) -> ClientState:
        """What a client works with in a round: its own state, made when it is first asked for."""
        return self._states[client] if client in self._states else self.init_client(start)

    def keep_client_state(self, client: int, state: ClientState) -> None:
        """Keep a copy of a client's state, in host memory."""
        if state:
            self._states[client] = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    def change(self, client: int, state: ClientState) -> ClientState:
        """What a client's new state adds to the one that is kept."""
        kept = self._states.get(client, {})
        return {name: value - kept[name].to(value) if name in kept else value for name, value in state.items()}

    def aggregate_states(self, change: Named) -> None:
        """Add to the mean of all clients' states."""
        self.mean = {name: value + self.mean[name].to(value) if self.mean else value for name, value in change.items()}

    def record_broadcast(self, clients: Iterable[int]) -> None:
        """Let clients keep the mean as it is now, which came with the model they may train again, in host memory."""
        mean = {name: value.cpu() for name, value in self.mean.items()}
        self._broadcast_means = {**self._broadcast_means, **dict.fromkeys(clients, mean)}

    def broadcast_mean(self, client: int) -> ClientState:
        """The mean that came with the model a client trains: the server's, or an older one."""
        return self._broadcast_means.get(client, self.mean)

    def reset(self) -> None:
        """Forget what another run left behind."""
        self._states, self.mean, self._broadcast_means = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """The clients' states, their mean and what clients were told of it, for a checkpoint."""
        parts: dict[str, Mapping[Any, Any]] = {
            "clients": self._states,
            "mean": self.mean,
            "broadcast_means": self._broadcast_means,
        }
        return {name: dict(own) for name, own in parts.items() if own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the clients' states, their mean and what clients were told of it from a checkpoint."""
        parts = (dict(state_dict.get(name, {})) for name in ("clients", "mean", "broadcast_means"))
        self._states, self.mean, self._broadcast_means = parts


def find_objectives(callbacks: Iterable[Any]) -> list[ClientObjective]:
    """The client objectives among callbacks, in their order, with those that a rule brings along.

    Raises:
        ValueError: If two cannot be told apart.
    """
    brought = ((callback, *getattr(callback, "objectives", ())) for callback in callbacks)
    found = [each for together in brought for each in together if isinstance(each, ClientObjective)]
    keys = [objective.state_key for objective in found]
    for key, objective in zip(keys, found, strict=True):
        if keys.count(key) > 1:
            name = type(objective).__name__
            raise ValueError(
                f"`callbacks` has the client objective {name} {keys.count(key)} times, those that rules bring along"
                " included. Remove all but one, or tell them apart by `name=`."
            )
    return found

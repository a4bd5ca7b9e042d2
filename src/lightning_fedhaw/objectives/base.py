"""Base class of client objectives, the terms that clients add to their own loss."""

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
"""Prefix of a parameter's name, for its gradient in the state of an objective with ``needs_gradient``."""


class ClientObjective(KeyedCallback):
    """Base class of terms that clients add to the loss of their ``training_step``; several terms are summed.

    A new objective implements :meth:`penalty`, or :meth:`gradient` if its closed form is known, which is much cheaper
    than differentiating the term. One with a state per client also implements :meth:`init_client` and
    :meth:`end_client`. All of these are pure functions of the tensors of one client, for both engines. Only clients
    whose update was received have a state. It is in host memory, and is checkpointed.

    Args:
        name: Distinguishes two objectives of one class in a checkpoint.

    Attributes:
        mean: With ``shares_state``, the mean of all N clients' states, on the server; empty until an update has been
            received. Clients know the mean that was broadcast to them, :meth:`broadcast_mean`.
    """

    key = "ClientObjective"

    proximal: float = 0.0
    """The proximal coefficient: the factor of ``|w - start|^2 / 2`` in the term."""

    shares_state: bool = False
    """Whether the server keeps the mean of all clients' states. It is broadcast with the model, and each client sends
    the change of its state with its update, which doubles the bytes of both links. States then begin at zero, with one
    tensor per parameter under the parameter's name."""

    needs_learning_rates: bool = False
    """Whether the term depends on the clients' learning rates, so that a rule must not change them within a round."""

    needs_gradient: bool = False
    """Whether :meth:`end_client` needs the gradient of the client's mean loss at ``start``. It is then in the client's
    state, under ``GRADIENT`` and the parameter's name, and costs one more pass over the client's data."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = arguments.optional(arguments.text, "name", name)
        self._states: dict[int, ClientState] = {}
        self.mean: ClientState = {}
        self._broadcast_means: dict[int, ClientState] = {}

    @property
    def state_key(self) -> str:
        """The key and name: Lightning keeps one state per key."""
        if not self.name:
            return type(self).key
        return f"{type(self).key}/{self.name}"

    @property
    def is_closed(self) -> bool:
        """Whether the gradient of the term is known in closed form."""
        return type(self).gradient is not ClientObjective.gradient

    @property
    def remembers(self) -> bool:
        """Whether clients have a state from round to round."""
        kind = type(self)
        has_initial_state = kind.init_client is not ClientObjective.init_client
        changes_state = kind.end_client is not ClientObjective.end_client
        return has_initial_state or changes_state

    def penalty(self, parameters: Named, start: Named, state: ClientState) -> Tensor:
        """Return the term, differentiable in the parameters; only its gradient is used, not its value.

        Args:
            parameters: The local model's trainable parameters, by name.
            start: The model from which the client started the round, by name.
            state: The client's state.

        Returns:
            A scalar.
        """
        detached = {name: value.detach() for name, value in parameters.items()}
        gradients = self.gradient(detached, start, state)
        # A linear function of the parameters whose gradient is the closed form.
        products = [(parameters[name] * gradient).sum() for name, gradient in gradients.items()]
        return torch.stack(products).sum()

    def gradient(self, parameters: Named, start: Named, state: ClientState) -> Named:
        """Return the gradient of the term for each parameter, by name; called without autograd.

        Args:
            parameters: The local model's trainable parameters, by name.
            start: The model from which the client started the round, by name.
            state: The client's state.

        Raises:
            NotImplementedError: If the objective implements neither this method nor :meth:`penalty`.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must implement `penalty` or `gradient`.")

    def init_client(self, start: Named) -> ClientState:
        """Return the state of a client that participates for the first time.

        Args:
            start: The model from which it starts the round, by name.
        """
        return {}

    def end_client(self, state: ClientState, start: Named, end: Named, num_steps: int) -> ClientState:
        """Return a client's new state after local training.

        Args:
            state: The state it trained with.
            start: The model from which it started, by name.
            end: The model after its last step, by name.
            num_steps: The number of its optimizer steps.

        Returns:
            The new state; an empty dictionary leaves the old state unchanged.
        """
        return state

    def client_state(self, client: int, start: Named) -> ClientState:
        """Return the state with which a client trains in a round.

        Args:
            client: The client.
            start: The model from which it starts, by name.
        """
        if client in self._states:
            return self._states[client]
        return self.init_client(start)

    def keep_client_state(self, client: int, state: ClientState) -> None:
        """Keep a copy of a client's state in host memory; an empty state leaves the old one unchanged."""
        if state:
            # A copy, because the engine uses the tensors again for other clients.
            self._states[client] = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    def change(self, client: int, state: ClientState) -> ClientState:
        """Return the difference between a client's new state and its old one; without an old one, the new state."""
        old_state = self._states.get(client, {})
        change: ClientState = {}
        for name, value in state.items():
            change[name] = value - old_state[name].to(value) if name in old_state else value
        return change

    def aggregate_states(self, change: Named) -> None:
        """Add to the mean of all clients' states.

        Args:
            change: The mean over all N clients of the changes of their states, by parameter.
        """
        mean: ClientState = {}
        for name, value in change.items():
            mean[name] = value + self.mean[name].to(value) if self.mean else value
        self.mean = mean

    def record_broadcast(self, clients: Iterable[int]) -> None:
        """Keep the current mean for clients that receive it, in host memory: they may train an outdated model later."""
        mean = {name: value.cpu() for name, value in self.mean.items()}
        # A new dictionary, so that an interrupted round can restore the old one.
        self._broadcast_means = {**self._broadcast_means, **dict.fromkeys(clients, mean)}

    def broadcast_mean(self, client: int) -> ClientState:
        """Return the mean that was broadcast with the model that a client trains: the server's, or an older one."""
        return self._broadcast_means.get(client, self.mean)

    def reset(self) -> None:
        """Forget the states of an earlier run."""
        self._states = {}
        self.mean = {}
        self._broadcast_means = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the clients' states, their mean and the means that were broadcast, for a checkpoint."""
        state: dict[str, Any] = {}
        if self._states:
            state["clients"] = dict(self._states)
        if self.mean:
            state["mean"] = dict(self.mean)
        if self._broadcast_means:
            state["broadcast_means"] = dict(self._broadcast_means)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the clients' states, their mean and the means that were broadcast from a checkpoint."""
        self._states = dict(state_dict.get("clients", {}))
        self.mean = dict(state_dict.get("mean", {}))
        self._broadcast_means = dict(state_dict.get("broadcast_means", {}))


def find_objectives(callbacks: Iterable[object]) -> list[ClientObjective]:
    """Return the client objectives among callbacks, including those of the aggregation rule, in their order.

    Args:
        callbacks: The trainer's callbacks.

    Raises:
        ValueError: If two objectives have the same class and name, so that a checkpoint could not tell them apart.
    """
    objectives: list[ClientObjective] = []
    for callback in callbacks:
        # A rule such as SCAFFOLD has the objectives of its clients in `objectives`.
        for candidate in (callback, *getattr(callback, "objectives", ())):
            if isinstance(candidate, ClientObjective):
                objectives.append(candidate)
    keys = [objective.state_key for objective in objectives]
    for objective in objectives:
        count = keys.count(objective.state_key)
        if count > 1:
            name = type(objective).__name__
            raise ValueError(
                f"`callbacks` has the client objective {name} {count} times, including those that come with a rule."
                " Remove all but one, or distinguish them by `name=`."
            )
    return objectives

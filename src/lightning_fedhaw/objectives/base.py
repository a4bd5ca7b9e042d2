"""Base class of client objectives, the terms that clients add to their own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_fedhaw import arguments
from lightning_fedhaw.keys import KeyedCallback
from lightning_fedhaw.objectives.local_training import LocalTraining
from lightning_fedhaw.objectives.view import FORWARD, StepView, StepWatch

ClientState = dict[str, Tensor]
Named = Mapping[str, Tensor]

GRADIENT = "gradient of "
"""Prefix of a parameter's name, for its gradient in the state of an objective with ``needs_gradient``."""

START_BUFFER = "start buffer "
"""Prefix of a buffer's name, for its value at the start of the round in the state of an objective with ``loss``."""

END_BUFFER = "end buffer "
"""Prefix of a buffer's name, for its value after local training in the state that such an objective ends with."""


class ClientObjective(KeyedCallback):
    """Base class of terms that clients add to the loss of their ``training_step``; several terms are summed.

    A new objective implements :meth:`penalty`, or :meth:`gradient` if its closed form is known, which is much cheaper
    than differentiating the term, or :meth:`loss` if the term depends on the batch or on outputs of the module. One
    with a state per client also implements :meth:`init_client` and :meth:`end_client`. All of these are pure functions
    of the tensors of one client, for both engines. Only clients whose update was received have a state. It is in host
    memory, and is checkpointed.

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
    def reads_batch(self) -> bool:
        """Whether the term depends on the batch or on outputs of the module: whether :meth:`loss` is implemented."""
        return type(self).loss is not ClientObjective.loss

    @property
    def watched(self) -> Sequence[str]:
        """The names of submodules whose outputs :meth:`loss` reads; ``"forward"`` is the module's own call."""
        return ()

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

    def loss(self, step: StepView, state: ClientState) -> Tensor:
        """Return a term that depends on the batch, differentiable in the parameters; instead of :meth:`penalty`.

        Args:
            step: The batch, the outputs of the submodules that :attr:`watched` names, and the same outputs of other
                models: of the one that was received, or of any in the client's state.
            state: The client's state.

        Returns:
            A scalar.

        Raises:
            NotImplementedError: If the objective does not implement it.
        """
        raise NotImplementedError(f"`{type(self).__name__}` does not implement `loss`.")

    def term(self, parameters: Named, start: Named, state: ClientState, watch: StepWatch | None) -> Tensor:
        """Return the term in one step: :meth:`loss` where it is implemented, else :meth:`penalty`.

        Args:
            parameters: The local model's trainable parameters, by name.
            start: The model from which the client started the round, by name.
            state: What :meth:`begin_client` returned.
            watch: The record of the step, for :meth:`loss`.
        """
        if not self.reads_batch or watch is None:
            return self.penalty(parameters, start, state)
        own_state: ClientState = {}
        start_buffers: ClientState = {}
        for name, value in state.items():
            if name.startswith(START_BUFFER):
                start_buffers[name.removeprefix(START_BUFFER)] = value
            else:
                own_state[name] = value
        return self.loss(StepView(watch.batch, watch.output, parameters, start, start_buffers, watch), own_state)

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

    def begin_client(self, client: int, start: Named, buffers: Named) -> ClientState:
        """Return all tensors that a client's steps need: its state and, for :meth:`loss`, what else it starts from.

        Args:
            client: The client.
            start: The model from which it starts, by name.
            buffers: The buffers and local parameters from which it starts, by name.
        """
        state = self.client_state(client, start)
        if not self.reads_batch:
            return state
        return {**state, **{START_BUFFER + name: value for name, value in buffers.items()}}

    def finish_client(
        self, state: ClientState, start: Named, end: Named, end_buffers: Named, num_steps: int
    ) -> ClientState:
        """Return a client's new state by :meth:`end_client`, without the buffers that were lent to it.

        Args:
            state: What :meth:`begin_client` returned.
            start: The model from which the client started, by name.
            end: The model after its last step, by name.
            end_buffers: The buffers and local parameters after its last step, by name.
            num_steps: The number of its optimizer steps.
        """
        if not self.reads_batch:
            return self.end_client(state, start, end, num_steps)
        lent = dict(state)
        for name, value in end_buffers.items():
            lent[END_BUFFER + name] = value
        new_state = dict(self.end_client(lent, start, end, num_steps))
        # They are the module's, and would be kept for every client.
        for name in list(new_state):
            if name.startswith((START_BUFFER, END_BUFFER)):
                del new_state[name]
        return new_state

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a module that lacks a submodule that the objective reads.

        Raises:
            ValueError: Naming the submodule, and those that are there.
        """
        for name in self.watched:
            _check_submodule(self, name, pl_module)

    def read_local_training(self, local_training: LocalTraining) -> None:
        """Read what is needed of the clients' optimizers and of the module; by default nothing.

        Called when a ``fit`` begins, once a checkpoint has been restored, and again before every round, because
        schedules change the settings of optimizers. What is read in ``setup`` or ``on_fit_start`` would be that of
        before the checkpoint.

        Args:
            local_training: How clients train.

        Raises:
            ValueError: If it cannot be worked with.
        """

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


def make_watch(
    objectives: Iterable[ClientObjective],
    module: torch.nn.Module,
    context: Callable[[], AbstractContextManager[object]],
) -> StepWatch | None:
    """Make the record of a step's calls for the objectives that read them; ``None`` if none does.

    Args:
        objectives: The client objectives.
        module: The user's module.
        context: Gives the context of a training step in the trainer's precision.
    """
    names: list[str] = []
    is_needed = False
    for objective in objectives:
        if objective.reads_batch:
            # One that watches no submodule still reads the batch and the output.
            is_needed = True
            names.extend(objective.watched)
    if not is_needed:
        return None
    return StepWatch(module, names, context)


def _check_submodule(objective: ClientObjective, name: str, module: pl.LightningModule) -> None:
    owner = type(objective).__name__
    kind = type(module).__name__
    if name == FORWARD:
        if type(module).forward is pl.LightningModule.forward:
            raise ValueError(
                f"`{owner}` reads the output of the module's `forward`, and {kind} has none. Define it and call"
                " `self(...)` in `training_step`, or name the submodule whose output is meant."
            )
        return
    # Without the module itself, which comes first and has the empty name.
    names = [submodule_name for submodule_name, _ in module.named_modules()][1:]
    if name in names:
        return
    # A large model has hundreds of submodules, so the nearest one comes first.
    similar = get_close_matches(name, names, 1)
    hint = f"; did you mean '{similar[0]}'?" if similar else "."
    raise ValueError(
        f"`{owner}` reads the output of the submodule '{name}', and {kind} has none of that name{hint} It has"
        f" {', '.join(names[:20])}."
    )


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

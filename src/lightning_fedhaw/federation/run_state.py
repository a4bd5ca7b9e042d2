"""The state that rounds change: the undo of a round that fails, and what a checkpoint holds.

An owner of a part of it (server, rule, engine, buffers, channels, objectives) keeps that part and changes it; here are
the places where all parts are read or written together. Owners replace what they keep and do not change it in place, so
a snapshot costs references and no copies of tensors.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_fedhaw.clients.attributes import AttributeState
from lightning_fedhaw.clients.engine import Engine
from lightning_fedhaw.clients.optimizer_states import OptimizerStates
from lightning_fedhaw.clients.records import metrics_of
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.federation.context import RunContext
from lightning_fedhaw.federation.placement import Placement
from lightning_fedhaw.federation.records import Tally
from lightning_fedhaw.federation.run_identity import RunIdentity
from lightning_fedhaw.federation.screening import Screening
from lightning_fedhaw.federation.transport import Transport
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.server import ModuleChanges
from lightning_fedhaw.vectors.memory import HOST


class Stateful(Protocol):
    """A channel or a client objective: a callback whose state changes while clients train."""

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""


@dataclass(frozen=True)
class CallbackState:
    """The state of one callback before a round.

    Attributes:
        callback: The channel or client objective.
        state: What its ``state_dict`` returned, with a shallow copy of every value.
    """

    callback: Stateful
    state: dict[str, Any]


@dataclass(frozen=True)
class RoundSnapshot:
    """Everything that a round may change, in the state before the round.

    Attributes:
        entries: What clients keep, and what the run counts, as entries of a checkpoint.
        attributes: The attributes of the module that clients keep.
        callbacks: The states of channels and client objectives.
        rule_state: The state of the aggregation rule.
        parameters: ``[P]``, the global parameters.
        buffers: The global buffers.
    """

    entries: dict[str, Any]
    attributes: AttributeState
    callbacks: Sequence[CallbackState]
    rule_state: dict[str, Any]
    parameters: Tensor
    buffers: dict[str, Tensor]

    def state_of(self, callback: object) -> dict[str, Any] | None:
        """Return the state of a channel, a client objective or the rule for a checkpoint; None for another object."""
        for saved in self.callbacks:
            if saved.callback is callback:
                return saved.state
        if not isinstance(callback, Rule):
            return None
        # Copies, because the rule and its objectives are at work.
        rule = copy.copy(callback)
        rule.state = self.rule_state
        objectives = []
        for objective in callback.objectives:
            objective_before = copy.copy(objective)
            objective_before.load_state_dict(self.state_of(objective) or {})
            objectives.append(objective_before)
        rule.objectives = tuple(objectives)
        return rule.state_dict()


@dataclass(frozen=True)
class ProcessMemory:
    """The state that clients keep on one process.

    Attributes:
        optimizer_states: The optimizer states that clients keep.
        local_buffers: The buffers that clients keep.
        local_parameters: The parameters that clients keep.
        callbacks: The states of uplink channels and client objectives.
    """

    optimizer_states: dict[int, list[OptimizerStates]]
    local_buffers: dict[int, dict[str, Tensor]]
    local_parameters: dict[int, dict[str, Tensor]]
    callbacks: list[dict[str, Any]]


class RunState:
    """The state of a run between rounds, most of which is stored by its owners: this class knows all of them.

    Args:
        context: What all steps of a round work with.
        buffers: The policy for buffers, which holds those that clients keep.
        transport: The channels.
        objectives: The client objectives.
        placement: The process of each client.
        screening: The screening of updates, which counts rounds.

    Attributes:
        identity: What makes this run the one that a checkpoint is of.
        tally: The costs and incidents of the run so far.
    """

    def __init__(
        self,
        context: RunContext,
        *,
        buffers: Buffers,
        transport: Transport,
        objectives: Sequence[ClientObjective],
        placement: Placement,
        screening: Screening,
    ) -> None:
        self.server = context.server
        self.rule = context.rule
        self.ranks = context.ranks
        self.buffers = buffers
        self.placement = placement
        self.screening = screening
        self.tally = Tally()
        # Their state changes on the process that trains the client. The state of downlink channels is equal on all
        # processes, each of which computes the broadcast to all clients.
        self.spread_callbacks: list[Stateful] = [*transport.uplink, *objectives]
        self.callbacks: list[Stateful] = [*transport.uplink, *transport.downlink, *objectives]
        self.identity = RunIdentity(context, self.callbacks)

    # ------------------------------------------------------------------ changes between rounds

    def adopt_changes(self) -> None:
        """Make what the user's code changed in the module since the last round a part of the global model.

        Raises:
            RuntimeError: If processes have made different changes.
        """
        changes = self.server.changes_in_module()
        # Parameters that only the server changes are in the rule's state, and not in the server's vector.
        of_rule = self.server.changed_server_parameters(self.rule.server_parameters(self.rule.state))
        if self.ranks.size > 1:
            self._check_changes(changes, of_rule)
        self.server.adopt(changes)
        if of_rule:
            self.rule.state = dict(self.rule.with_server_parameters(self.rule.state, of_rule))
        # The user has set these buffers for everybody, so clients do not go on with their own.
        self.buffers.local.forget(changes.names)

    def _check_changes(self, changes: ModuleChanges, of_rule: Mapping[str, Tensor]) -> None:
        """Refuse changes of the global model that are not the same on all processes.

        Args:
            changes: The changes of the server's parameters and buffers.
            of_rule: The changed parameters of the rule, by name.
        """
        tensors = {**self.server.layout.views(changes.parameters), **changes.buffers, **of_rule}
        checksums = self.ranks.gather({name: _checksum(tensors[name]) for name in (*changes.names, *of_rule)})
        for rank, other in enumerate(checksums):
            different = []
            for name in {**checksums[0], **other}:
                if checksums[0].get(name) != other.get(name):
                    different.append(name)
            if different:
                raise RuntimeError(
                    f"Between two rounds `{different[0]}` was changed in the module, and not to the same values on"
                    f" processes 0 and {rank}. Every process holds the global model, so a hook that changes it must do"
                    " so on all of them, and with the same numbers: without `rank_zero_only`, and with draws that are"
                    " seeded."
                )

    # ------------------------------------------------------------------ the undo of a round

    def snapshot(self, engine: Engine) -> RoundSnapshot:
        """Remember everything that the next round may change.

        Args:
            engine: The engine of the round, which holds the clients' optimizer states.
        """
        callbacks = []
        for callback in self.callbacks:
            # A callback may be the user's and add to its dictionaries in place, hence a copy of each.
            state = {name: copy.copy(value) for name, value in callback.state_dict().items()}
            callbacks.append(CallbackState(callback, state))
        return RoundSnapshot(
            entries=self.entries(engine),
            attributes=engine.attributes.snapshot(),
            callbacks=callbacks,
            rule_state=self.rule.state,
            parameters=self.server.parameters(),
            buffers=self.server.buffers,
        )

    def restore(self, engine: Engine, snapshot: RoundSnapshot) -> None:
        """Undo a round that failed.

        Args:
            engine: The engine of the round.
            snapshot: The state from before the round.
        """
        self.load_entries(snapshot.entries, engine)
        engine.attributes.undo(snapshot.attributes)
        for saved in snapshot.callbacks:
            saved.callback.load_state_dict(saved.state)
        # The clients that had trained before the failure were counted in the module's metrics.
        for metric in metrics_of(self.server.module):
            metric.reset()
        self.rule.state = snapshot.rule_state
        # The module may hold the model of the client that failed.
        self.server.put_back(snapshot.parameters, snapshot.buffers)
        self.server.write_server_parameters(self.rule.server_parameters(snapshot.rule_state))

    def state_before(self, snapshot: RoundSnapshot) -> dict[str, Any]:
        """Return what :meth:`state_dict` returned before a round that is running; in one process only.

        Args:
            snapshot: The state from before the round.
        """
        state = {**self.identity.entries, **snapshot.entries}
        if not self.server.layout.is_exact:
            state["parameters"] = snapshot.parameters.cpu()
        return state

    def model_before(self, snapshot: RoundSnapshot) -> dict[str, Tensor]:
        """Return the global model before a round as the module held it: parameters and buffers by name, as copies.

        Args:
            snapshot: The state from before the round.
        """
        layout = self.server.layout
        model = {}
        views = layout.views(snapshot.parameters.detach())
        for dtype, (name, value) in zip(layout.dtypes, views.items(), strict=True):
            model[name] = value.to(dtype, copy=True)
        for name, value in {**self.server.local_parameters, **snapshot.buffers}.items():
            model[name] = value.clone()
        for name, value in self.rule.server_parameters(snapshot.rule_state).items():
            model[name] = value.to(self.server.module.get_parameter(name).dtype, copy=True)
        return model

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self, engine: Engine) -> dict[str, Any]:
        """Return everything that is not in the module, the rule or another callback: plain values and tensors.

        Args:
            engine: The engine, which holds the clients' optimizer states.
        """
        self._collect(engine)
        state = {**self.identity.entries, **self.entries(engine)}
        if not self.server.layout.is_exact:
            state["parameters"] = self.server.changes_in_module().parameters.cpu()
        return state

    def load_state_dict(self, state: Mapping[str, Any], engine: Engine, source: str) -> None:
        """Resume from a checkpoint.

        Args:
            state: What :meth:`state_dict` returned.
            engine: The engine, which holds the clients' optimizer states.
            source: The name of the checkpoint, for errors and warnings.

        Raises:
            ValueError: If it is of another federation, has another format, or lacks a part.
        """
        self.identity.resume(state, source)
        self.load_entries(state, engine)
        # A checkpoint of an earlier version has none.
        if "attributes" in state:
            engine.attributes.load_state_dict(state["attributes"])
        if "parameters" in state:
            self.server.install(state["parameters"].to(self.server.parameters()))

    def entries(self, engine: Engine) -> dict[str, Any]:
        """Return what clients keep, and what the run counts, as entries of a checkpoint."""
        entries: dict[str, Any] = {
            "optimizers": dict(engine.optimizer_states),
            "attributes": engine.attributes.state_dict(),
            "buffers": dict(self.buffers.local.of_clients),
            "local_parameters": dict(engine.local_parameters.of_clients),
            "tally": self.tally.state_dict(),
        }
        if self.screening.nonfinite_rounds:
            entries["nonfinite_rounds"] = self.screening.nonfinite_rounds
        placement = self.placement.state_dict()
        if placement:
            entries["placement"] = placement
        return entries

    def load_entries(self, entries: Mapping[str, Any], engine: Engine) -> None:
        """Load what :meth:`entries` returned, except for the attributes.

        Of these, an undo puts back what the round has replaced in the module, and a checkpoint does not know that.

        Args:
            entries: The entries, perhaps among others.
            engine: The engine, which holds the clients' optimizer states.
        """
        engine.optimizer_states = dict(entries["optimizers"])
        self.buffers.local.load(entries["buffers"])
        # A checkpoint of an earlier version has none.
        engine.local_parameters.of_clients = dict(entries.get("local_parameters", {}))
        self.tally = Tally.from_state(entries["tally"])
        # There is no entry if the last round was a good one.
        self.screening.nonfinite_rounds = entries.get("nonfinite_rounds", 0)
        self.placement.load_state_dict(entries.get("placement", {}))

    def _collect(self, engine: Engine) -> None:
        """Gather the state that clients keep on other processes on process 0, which writes checkpoints."""
        if self.ranks.size == 1 or not self.placement.is_sticky:
            return
        states = [move_data_to_device(callback.state_dict(), HOST) for callback in self.spread_callbacks]
        own = engine.local_parameters.of_clients
        memories = self.ranks.gather_to_first(
            ProcessMemory(engine.optimizer_states, self.buffers.local.of_clients, own, states)
        )
        if not memories:
            return
        merged = self.placement.merged
        engine.optimizer_states = merged([memory.optimizer_states for memory in memories])
        self.buffers.local.of_clients = merged([memory.local_buffers for memory in memories])
        engine.local_parameters.of_clients = merged([memory.local_parameters for memory in memories])
        for position, callback in enumerate(self.spread_callbacks):
            states = [memory.callbacks[position] for memory in memories]
            names = sorted(set().union(*states))
            merged_state = {}
            for name in names:
                merged_state[name] = merged([state.get(name) for state in states])
            callback.load_state_dict(merged_state)

    # ------------------------------------------------------------------ what distinguishes clients' models

    def own_tensors(self, engine: Engine) -> dict[int, dict[str, Tensor]]:
        """Return what distinguishes each client's model from the global one.

        These are the local parameters that a client has trained and, with ``buffers="local"``, its buffers. Without
        local parameters nothing distinguishes them: clients are evaluated with the global model.

        Args:
            engine: The engine, which holds the local parameters.
        """
        if not self.server.layout.local:
            return {}
        own = {}
        for client, parameters in engine.local_parameters.of_clients.items():
            own[client] = {**parameters, **self.buffers.local.start(client)}
        return own

    def own_tensors_of_all(self, engine: Engine) -> dict[int, dict[str, Tensor]]:
        """Return what :meth:`own_tensors` returns of the clients of all processes, and change nothing."""
        own = self.own_tensors(engine)
        if self.ranks.size == 1 or not self.server.layout.local:
            return own
        merged: dict[int, dict[str, Tensor]] = self.placement.merged(self.ranks.gather(own))
        return merged

    def share_own_tensors(self, engine: Engine) -> None:
        """Give every process the local parameters and buffers of all clients, at the end of a run.

        Args:
            engine: The engine, which holds the local parameters.
        """
        is_in_use = bool(self.server.layout.local) or self.buffers.remembers
        if self.ranks.size == 1 or not is_in_use:
            return
        memories = self.ranks.gather((engine.local_parameters.of_clients, self.buffers.local.of_clients))
        engine.local_parameters.of_clients = self.placement.merged([parameters for parameters, _ in memories])
        self.buffers.local.of_clients = self.placement.merged([buffers for _, buffers in memories])


def _checksum(tensor: Tensor) -> str:
    """Return a checksum of a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest()

"""The state that rounds change, and the undo of a round that fails."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_fedhaw.aggregation.base import AggregationRule
from lightning_fedhaw.clients.engine import Engine
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.server import Server


class Stateful(Protocol):
    """A channel or a client objective: a callback whose state changes while clients train."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""


@dataclass(frozen=True)
class CallbackState:
    """The state of one callback before a round.

    Attributes:
        callback: The channel or client objective.
        state: What its ``state_dict`` gave, with a shallow copy of every value.
    """

    callback: Stateful
    state: dict[str, Any]


@dataclass(frozen=True)
class RoundSnapshot:
    """Everything that a round may change, as it was before.

    Attributes:
        optimizer_states: The optimizer states that clients find again.
        local_buffers: The buffers that clients find again.
        callbacks: The states of channels and client objectives.
        rule: The state of the aggregation rule.
        parameters: ``[P]``, the global parameters.
        buffers: The global buffers.
    """

    optimizer_states: dict[int, list[dict[int, dict[str, Any]]]]
    local_buffers: dict[int, dict[str, Tensor]]
    callbacks: Sequence[CallbackState]
    rule: dict[str, Any]
    parameters: Tensor
    buffers: dict[str, Tensor]


class RunState:
    """The state of a run between rounds.

    Args:
        server: The global model.
        rule: The aggregation rule.
        buffers: The policy for buffers, which holds those that clients find again.
        callbacks: The channels and client objectives.
    """

    def __init__(self, server: Server, rule: AggregationRule, buffers: Buffers, callbacks: Iterable[Stateful]) -> None:
        self.server = server
        self.rule = rule
        self.buffers = buffers
        self.callbacks = list(callbacks)

    def snapshot(self, engine: Engine) -> RoundSnapshot:
        """Remember everything that the next round may change.

        Entries of these dictionaries are replaced and never changed in place, so shallow copies are enough.

        Args:
            engine: The engine of the round, which holds the clients' optimizer states.
        """
        callbacks = []
        for callback in self.callbacks:
            state = {name: copy.copy(value) for name, value in callback.state_dict().items()}
            callbacks.append(CallbackState(callback, state))
        return RoundSnapshot(
            optimizer_states=dict(engine.kept),
            local_buffers=dict(self.buffers.local),
            callbacks=callbacks,
            rule=self.rule.state,
            parameters=self.server.parameters(),
            buffers=self.server.buffers,
        )

    def restore(self, engine: Engine, snapshot: RoundSnapshot) -> None:
        """Undo a round that failed.

        Args:
            engine: The engine of the round.
            snapshot: The state from before the round.
        """
        engine.kept = snapshot.optimizer_states
        self.buffers.local = snapshot.local_buffers
        for saved in snapshot.callbacks:
            saved.callback.load_state_dict(saved.state)
        # The clients that had trained before the failure were counted in the module's metrics.
        for metric in metrics_of(self.server.module):
            metric.reset()
        self.rule.state = snapshot.rule
        # The module may hold the model of the client that failed.
        self.server.put_back(snapshot.parameters, snapshot.buffers)


def metrics_of(module: nn.Module) -> list[Metric]:
    """List the ``torchmetrics`` objects in a module."""
    return [submodule for submodule in module.modules() if isinstance(submodule, Metric)]

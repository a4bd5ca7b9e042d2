"""The training of a cohort: local work on all processes, messages up, and the records of what was received.

Shapes: P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_fedhaw.clients.engine import ClientTask, Engine
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.federation.context import RunContext
from lightning_fedhaw.federation.initial_loss import InitialLosses
from lightning_fedhaw.federation.records import LocalResults, Received, RoundPlan, Tally, UpdateRecord
from lightning_fedhaw.federation.screening import Screening
from lightning_fedhaw.federation.shared_states import SharedStates
from lightning_fedhaw.federation.stores import RoundStores, VectorStore, make_store
from lightning_fedhaw.federation.transport import Transport
from lightning_fedhaw.vectors.memory import HOST

_NO_VECTOR = torch.empty(0)


@dataclass(frozen=True)
class RoundShare:
    """One process's share of a round.

    Attributes:
        plan: The plan of the round.
        clients: The clients of this process.
        engine: The engine, which trains them.
        tally: The costs and incidents of the run.
        stores: The stores of the vectors that they send.
    """

    plan: RoundPlan
    clients: Sequence[int]
    engine: Engine
    tally: Tally
    stores: RoundStores


class CohortTraining:
    """The training of each round's cohort, from the clients' tasks to the updates that the server has received.

    Args:
        context: What all steps of a round work with.
        buffers: The policy for buffers, which knows those that a client starts from.
        shared_states: The states that client objectives share with the server.
        transport: The channels of the updates.
        screening: Excludes updates that are not finite.

    Attributes:
        initial_losses: The clients' losses at the model they received, for rules that need them.
        on_client_start: Called with each task of this process, when an engine asks for it.
        on_client_end: Called with each update of this process.
    """

    def __init__(
        self,
        context: RunContext,
        buffers: Buffers,
        shared_states: SharedStates,
        transport: Transport,
        screening: Screening,
    ) -> None:
        self.host = context.host
        self.data = context.data
        self.rule = context.rule
        self.options = context.options
        self.ranks = context.ranks
        self.buffers = buffers
        self.shared_states = shared_states
        self.transport = transport
        self.screening = screening
        self.initial_losses = InitialLosses(context, buffers)
        self.on_client_start: Callable[[ClientTask], None] = _ignore
        self.on_client_end: Callable[[ClientUpdate], None] = _ignore

    def share(self, plan: RoundPlan, clients: Sequence[int], engine: Engine, tally: Tally) -> RoundShare:
        """Make the stores of the vectors that this process's clients send, and return the process's share.

        Args:
            plan: The plan of the round.
            clients: The clients of this process.
            engine: The engine, which trains them.
            tally: The costs and incidents of the run.
        """
        shared = self.shared_states.make_stores(plan.start, len(clients))
        displacements = make_store(
            self.rule, self.options, plan.start, len(clients), self.ranks, summed=self.transport.is_summed
        )
        return RoundShare(plan, clients, engine, tally, RoundStores(displacements, shared))

    def run(self, share: RoundShare, *, trains: bool) -> Received:
        """Train the cohort on all processes, and gather their results.

        Args:
            share: This process's share of the round.
            trains: Whether clients train; without training, only those that take part are recorded.
        """
        work = self._train if trains else self._stay_idle
        results = self.ranks.exchange(lambda: work(share))
        share.engine.restore_end_state([result.end_state for result in results])
        records = [record for result in results for record in result.records]
        excluded: dict[int, str] = {}
        for result in results:
            excluded.update(result.excluded)
        # The same order for any number of processes.
        slot_of = {client: slot for slot, client in enumerate(share.plan.slots)}
        records.sort(key=lambda record: slot_of[record.update.client])
        share.tally.nonfinite_updates += len(excluded)
        return Received(records, excluded)

    # ------------------------------------------------------------------ the share of one process

    def _train(self, share: RoundShare) -> LocalResults:
        """Do this process's part of a round: local training, the uplink, and substitutes for lost messages."""
        plan = share.plan
        engine = share.engine
        store = share.stores.displacements
        records: list[UpdateRecord] = []
        excluded: dict[int, str] = {}
        with closing(engine.run(self._tasks(share))) as updates:
            while True:
                update = _next_update(updates, share.tally)
                if update is None:
                    break
                with share.tally.phase("channel"):
                    reason = self._send_up(plan.round, update, store)
                self.on_client_end(update)
                if reason is not None:
                    excluded[update.client] = reason
                    continue
                update = self.initial_losses.added_to(update, plan.models)
                self.shared_states.collect(update, share.stores.shared)
                engine.commit(update)
                self.transport.remember(update, plan.start)
                records.append(self._record(update, store, received=True))
        for client in share.clients:
            substitute = self._substitute(share, client)
            if substitute is not None:
                records.append(self._record(substitute, store, received=False))
        end_state = engine.end_state()
        if self.ranks.size > 1:
            # Tensors on this process's device cannot be read by the others.
            end_state = move_data_to_device(end_state, HOST)
        return LocalResults(records, excluded, end_state)

    def _stay_idle(self, share: RoundShare) -> LocalResults:
        """Do this process's part of a round in which clients answer an inquiry instead of training."""
        engine = share.engine
        # Learning rates and schedules move on all the same: without tasks, as in a process that trains nobody, the
        # engine notes their state.
        list(engine.run(iter(())))
        for optimizer in self.host.optimizers:
            # A schedule steps after this round too, and would warn that no optimizer has.
            optimizer._opt_called = True  # type: ignore[attr-defined]
        records: list[UpdateRecord] = []
        for client in share.clients:
            if client in share.plan.trainees:
                update = self._update_without_training(share, client, torch.zeros_like(share.plan.start), num_steps=0)
                records.append(self._record(update, share.stores.displacements, received=True))
        return LocalResults(records, {}, engine.end_state())

    def _tasks(self, share: RoundShare) -> Iterator[ClientTask]:
        """Yield one task after another, each when the engine asks for it."""
        plan = share.plan
        slot = share.stores.displacements.slot
        for client in share.clients:
            if client not in plan.lost:
                buffers = self.buffers.start(client)
                task = ClientTask(client, plan.models[client], buffers, slot, plan.inverse_probability(client))
                self.on_client_start(task)
                yield task

    # ------------------------------------------------------------------ one client

    def _send_up(self, round_idx: int, update: ClientUpdate, store: VectorStore) -> str | None:
        """Send an update through the uplink.

        Returns:
            A sentence, if the update is not finite before or after, or if the store cannot hold it; else ``None``.
        """
        # A client that failed changes no channel's state.
        reason = self.screening.nonfinite_reason(round_idx, update)
        if reason is not None:
            return reason
        if self.transport.transmit(round_idx, update):
            # A channel may have made a finite update non-finite.
            reason = self.screening.nonfinite_reason(round_idx, update, " (they were finite when it sent them)")
        return reason or self.screening.misfit_reason(round_idx, update, store)

    def _substitute(self, share: RoundShare, client: int) -> ClientUpdate | None:
        """Make the substitute for a client's lost update, if its channel provides one and the rule takes it."""
        plan = share.plan
        if client not in plan.lost or not self.rule.takes_substitutes:
            return None
        substitute = plan.lost[client].substitute(client, plan.start)
        if substitute is None:
            return None
        return self._update_without_training(share, client, substitute.displacement, substitute.num_steps)

    def _update_without_training(
        self, share: RoundShare, client: int, displacement: Tensor, num_steps: int
    ) -> ClientUpdate:
        """Make the update of a client that did not train in this round."""
        return ClientUpdate(
            client=client,
            num_examples=len(self.data.train_indices[client]),
            num_steps=num_steps,
            num_skipped=0,
            displacement=displacement,
            num_batches=share.engine.num_batches(client),
            lr_scale=share.engine.plan.lr_scale_of(client),
            inverse_probability=share.plan.inverse_probability(client),
        )

    def _record(self, update: ClientUpdate, store: VectorStore, *, received: bool) -> UpdateRecord:
        """Store an update's vector on this process, and make its record for all processes."""
        unnormalized_weight = self.rule.weigh(update)
        store.commit(update, unnormalized_weight)
        rms = self.transport.rms(update) if received else 0.0
        buffers = update.buffers
        logged = update.logged
        if self.ranks.size > 1:
            # The record is sent to the other processes: without unchanged buffers, which they have, and without
            # metrics, which cannot be sent.
            buffers = self.buffers.changed(update)
            logged = {name: entry.located(self.host.module) for name, entry in logged.items()}
        changes = {"displacement": _NO_VECTOR, "buffers": buffers, "logged": logged, "memory": {}}
        # `replace` looks through the fields of the class for every client.
        abridged = ClientUpdate(**{**vars(update), **changes})
        return UpdateRecord(abridged, received, unnormalized_weight, self.ranks.rank, rms)


def _next_update(updates: Generator[ClientUpdate, None, None], tally: Tally) -> ClientUpdate | None:
    """Let the engine train until the next update; ``None`` after the last one."""
    with tally.phase("local training"):
        return next(updates, None)


def _ignore(*arguments: object) -> None:
    """Observe nothing."""

"""A federation: who takes part, and the order of a round. It knows no particular rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw.aggregation.base import AggregationRule, RuleStep
from lightning_fedhaw.channel.base import Channel, Link
from lightning_fedhaw.clients.choice import choose
from lightning_fedhaw.clients.engine import Engine, LocalPlan, Visit
from lightning_fedhaw.clients.records import merge
from lightning_fedhaw.clients.sequential import SequentialEngine
from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.cohort import ClientUpdate, Cohort
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.data.samplers import CohortSampler, EveryoneSampler, UniformSampler
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.federation.client_evaluation import ClientEvaluation, ClientMetrics
from lightning_fedhaw.federation.full_gradient import FullGradient
from lightning_fedhaw.federation.placement import Placement
from lightning_fedhaw.federation.records import LocalResults, Report, Tally, UpdateRecord
from lightning_fedhaw.federation.run_state import RunState
from lightning_fedhaw.federation.screening import Screening
from lightning_fedhaw.federation.shared_states import SharedStates
from lightning_fedhaw.federation.stores import VectorStore, make_store
from lightning_fedhaw.federation.transport import Transport
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.objectives.base import find_objectives
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.server import Server
from lightning_fedhaw.streams import seed_of
from lightning_fedhaw.vectors.client_vectors import AccumulatedVectors
from lightning_fedhaw.vectors.layout import ParameterLayout
from lightning_fedhaw.vectors.memory import HOST, is_out_of_memory

_NOTHING = torch.empty(0)


class Federation:
    """Everything of a run that lasts longer than a round.

    Args:
        host: The trainer around it.
        server: The global model.
        data: The clients' data.
        sampler: Who comes in a round.
        rule: How the server aggregates.
        callbacks: The trainer's callbacks, of which channels and client objectives are picked in list order.
        options: The federation's arguments.
        limit: Batches a local pass at most.
        cohort_cap: Clients a round at most, for a development run.
        ranks: The processes that share the work; this one alone by default.
    """

    def __init__(
        self,
        host: Host,
        server: Server,
        data: ClientData,
        sampler: CohortSampler,
        rule: AggregationRule,
        callbacks: Sequence[Any],
        options: FederationOptions,
        *,
        limit: int | float | None = None,
        cohort_cap: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.host, self.server, self.data, self.sampler, self.rule = host, server, data, sampler, rule
        self.options = options
        self.seed = options.resolved_seed
        self.cohort_cap = cohort_cap
        self.ranks = ranks or Ranks()
        channels = [callback for callback in callbacks if isinstance(callback, Channel)]
        objectives = find_objectives(callbacks)
        if objectives and not host.module.automatic_optimization:
            names = ", ".join(type(o).__name__ for o in objectives)
            raise ValueError(
                f"Client objectives ({names}) are added to the loss that `training_step` returns, and with"
                " `automatic_optimization=False` it returns none. Add the term in `training_step`, or use automatic"
                " optimisation."
            )
        self.buffers = Buffers(options.buffers, host, server, data, self.seed)
        plan = LocalPlan(
            epochs=None if options.local_steps is not None else options.local_epochs or 1,
            steps=options.local_steps,
            limit=limit,
            optimizer_state=options.optimizer_state,
            seed=self.seed,
            channels_last=options.channels_last,
        )
        self.engine: Engine = SequentialEngine(host, server.layout, data, plan, objectives)
        self.engine.gradient = FullGradient(host, server, data, self.seed).compute
        self.shared_states = SharedStates(objectives, self.layout, data.num_clients, rule, options, self.ranks)
        self.transport = Transport(channels, self.layout, [self.buffers, self.shared_states], self.seed)
        self.placement = Placement(
            self.ranks,
            is_sticky=options.optimizer_state == "kept"
            or options.buffers == "local"
            or any(channel.remembers for channel in self.transport.uplink)
            or any(objective.remembers for objective in objectives),
        )
        draws_uniformly = type(sampler) in (EveryoneSampler, UniformSampler) and cohort_cap is None
        self.transport.prepare(
            data.num_examples,
            rule,
            drawn_uniformly=len(self.cohort(0)) if draws_uniformly and channels else None,
            clients_remember=self.placement.is_sticky,
        )
        self.run_state = RunState(
            server,
            rule,
            data,
            options,
            buffers=self.buffers,
            transport=self.transport,
            objectives=objectives,
            placement=self.placement,
            ranks=self.ranks,
            seed=self.seed,
        )
        self.screening = Screening(options.on_nonfinite, server, self.buffers, rule, self.uplink)
        self.in_round = False
        self.on_round_start: Callable[[int, list[int]], None] = lambda round_, clients: None
        self.on_client_end: Callable[[ClientUpdate], None] = lambda update: None
        self.on_round_end: Callable[[Report], None] = lambda report: None

    @property
    def layout(self) -> ParameterLayout:
        """Where each trainable parameter lives in the flat vector."""
        return self.server.layout

    def message_bytes(self, link: Link) -> int:
        """Bytes of one message on a link as its channels pack it, with buffers and what objectives share beside it."""
        return self.transport.message_bytes(link)

    @property
    def uplink(self) -> Sequence[Channel]:
        """The channels from clients to server."""
        return self.transport.uplink

    @property
    def downlink(self) -> Sequence[Channel]:
        """The channels from server to clients."""
        return self.transport.downlink

    @property
    def tally(self) -> Tally:
        """The costs and incidents of the run so far."""
        return self.run_state.tally

    def check_agreement(self) -> None:
        """Refuse to go on where processes were given different data or another split.

        Raises:
            ValueError: Naming the processes that differ.
        """
        self.run_state.check_agreement()

    def choose_engine(self) -> str:
        """Take the engine that was asked for, or that the rule of ``engine="auto"`` names.

        Called when a run has begun, because the vectorized engine tries the module's step.

        Returns:
            One line that says which, and why.

        Raises:
            ValueError: If ``engine="vectorized"`` and the module's step is not a function.
        """
        sequential, options = self.engine, self.options
        self.engine, why = choose(
            sequential,
            options.engine,
            cohort=-(-len(self.cohort(0)) // self.ranks.size),
            chunk_memory=options.chunk_memory,
            compile_clients=options.compile_clients,
            processes=self.ranks.size,
        )
        return why

    def cohort(self, round_: int) -> list[int]:
        """The clients that are drawn for a round."""
        count = self.data.num_clients
        drawn = self.sampler.sample(round_, num_clients=count, sizes=self.data.num_examples, seed=self.seed)
        # In ascending order, so that sums over clients do not depend on the order they were named in.
        clients = sorted(int(client) for client in drawn)
        if len(set(clients)) != len(clients) or any(not 0 <= client < count for client in clients):
            raise ValueError(
                f"`sampler` ({type(self.sampler).__name__}) must name distinct clients of 0 to {count - 1}, got"
                f" {clients} for round {round_}."
            )
        return clients[: self.cohort_cap]

    def play(self, round_: int) -> Report:
        """One communication round. If it fails, it leaves nothing behind.

        Raises:
            FloatingPointError: If a client returns NaN or infinity and ``on_nonfinite="raise"``, or if every client
                that was heard does.
        """
        before = self.run_state.snapshot(self.engine)
        self.in_round = True
        try:
            return self._play(round_)
        except BaseException as error:
            if is_out_of_memory(error) and hasattr(error, "add_note"):  # Python 3.11
                error.add_note(self._memory_advice())
            self.run_state.restore(self.engine, before)
            raise
        finally:
            self.in_round = False

    def _memory_advice(self) -> str:
        """What a user can do where memory has run out, as far as it is not done yet."""
        rule, options = self.rule.innermost, self.options
        advice = ["give the clients a smaller `batch_size`"]
        if self.host.device != HOST:
            if self.data.device == self.host.device:
                advice.append('keep the training data in host memory by `data_device="cpu"`')
            keeps_rows = (self.rule.raw_weight is None or options.storage == "device") and not self.transport.is_summed
            if keeps_rows and options.storage != "host":
                advice.append('keep the clients\' vectors in host memory by `storage="host"`')
            if getattr(rule, "memory", None) == "device":
                advice.append(f'keep those of the last round there by `{type(rule).__name__}(memory="host")`')
        return f"Memory has run out. To need less: {'; '.join(advice)}."

    def _play(self, round_: int) -> Report:
        tally = self.tally
        clients = self.cohort(round_)
        with tally.phase("broadcast"):
            self.on_round_start(round_, clients)
            start = self.server.parameters()
            broadcast = self.transport.broadcast(round_, clients, start)
            if self.transport.may_be_outdated:
                self.shared_states.record_broadcast(broadcast.up_to_date)
            heard_down = broadcast.models
            lost_up = self.transport.uplink_outages(round_, list(heard_down))
            trainees = [client for client in heard_down if client not in lost_up]
            own = self.placement.assign([*trainees, *lost_up], self.engine.cost)
        self.engine.pace = self.rule.local_pace(self.rule.state, self.layout)
        if self.engine.pace is not None and any(objective.needs_learning_rates for objective in self.engine.objectives):
            raise ValueError(
                f"`{type(self.rule).__name__}` changes the clients' learning rates within a round, and a client"
                ' objective divides by them. Use a rule that leaves them alone, or for SCAFFOLD `option="I"`.'
            )
        shared = self.shared_states.make_stores(start, len(own))
        store = make_store(self.rule, self.options, start, len(own), self.ranks, summed=self.transport.is_summed)
        shares = self.ranks.exchange(lambda: self._work(round_, own, heard_down, lost_up, store, shared))
        self.engine.settle([share.aftermath for share in shares])
        order = {client: slot for slot, client in enumerate((*trainees, *lost_up))}
        arrived = sorted(
            (record for share in shares for record in share.records), key=lambda record: order[record.update.client]
        )
        updates = [record.update for record in arrived if record.heard]
        excluded = [sentence for share in shares for sentence in share.excluded]
        tally.nonfinite_updates += len(excluded)
        self.screening.check_round(
            round_, drawn=len(clients), trained=len(trainees), updates=updates, excluded=excluded
        )
        with tally.phase("aggregation"):
            metrics, weights = self._aggregate(round_, start, store, arrived, drawn=len(clients))
            self.shared_states.aggregate(start, shared, [record for record in arrived if record.heard])
        paced = 0 if self.engine.pace is None else self.engine.pace.numbers_sent * self.layout.dtype.itemsize
        down = len(clients) * paced + self.transport.sent_bytes("downlink", round_, clients)
        up = self.transport.sent_bytes("uplink", round_, [update.client for update in updates])
        tally.bytes_down += down
        tally.bytes_up += up
        tally.heard += len(updates)
        tally.lost_messages += len(clients) - len(trainees)
        tally.skipped_steps += sum(update.num_skipped for update in updates)
        metrics = {
            **metrics,
            "clients_heard": float(len(updates)),
            "bytes_down": float(down),
            "bytes_up": float(up),
        }
        report = Report(round_, clients, metrics, merge(update.logged for update in updates), weights)
        self.on_round_end(report)
        return report

    def restore_module(self) -> None:
        """Put the global model back into the module, which may hold a client's."""
        self.server.write(self.server.parameters(), self.server.buffers)

    # ------------------------------------------------------------------ the parts of a round

    def _work(
        self,
        round_: int,
        clients: Sequence[int],
        heard: Mapping[int, Tensor],
        lost: Mapping[int, Channel],
        store: VectorStore,
        shared: Sequence[VectorStore],
    ) -> LocalResults:
        """This process's part of a round: local training, the way up, and what stands in for lost messages."""
        records: list[UpdateRecord] = []
        excluded: list[str] = []
        visits = (
            Visit(client, heard[client], self.buffers.start(client), store.slot)
            for client in clients
            if client not in lost
        )
        with closing(self.engine.run(visits)) as training:
            while True:
                with self.tally.phase("local training"):
                    update = next(training, None)
                if update is None:
                    break
                # A client that failed moves no channel's state; and a channel may spoil what was good.
                with self.tally.phase("channel"):
                    sentence = self.screening.nonfinite_reason(round_, update) or self._transmit(round_, update)
                self.on_client_end(update)
                if sentence:
                    excluded.append(sentence)
                    continue
                self.shared_states.collect(update, shared)
                self.engine.commit(update)
                self.transport.remember(update, self.server.parameters())
                self.buffers.remember(update)
                records.append(self._record(update, store, heard=True))
        for client in clients:
            filled = lost[client].fill(client, self.server.parameters()) if client in lost else None
            if filled is not None:
                examples = len(self.data.train_indices[client])
                batches = self.engine.num_batches(client)
                update = ClientUpdate(client, examples, filled.num_steps, 0, filled.displacement, num_batches=batches)
                records.append(self._record(update, store, heard=False))
        aftermath = self.engine.aftermath()
        if self.ranks.size > 1:
            # Nobody wants tensors on another process's device.
            aftermath = move_data_to_device(aftermath, HOST)
        return LocalResults(records, excluded, aftermath)

    def _record(self, update: ClientUpdate, store: VectorStore, *, heard: bool) -> UpdateRecord:
        """Keep an update's vector here, and note the rest for everybody."""
        weight = 0.0 if self.rule.raw_weight is None else float(self.rule.raw_weight(update))
        store.commit(update, weight)
        size = self.transport.rms(update) if heard else 0.0
        return UpdateRecord(self._abridged(update), heard, weight, self.ranks.rank, size)

    def _abridged(self, update: ClientUpdate) -> ClientUpdate:
        """An update without its vector; on several processes, also without buffers that did not change."""
        buffers, logged = update.buffers, update.logged
        if self.ranks.size > 1:
            buffers = self.buffers.changed(update)
            logged = {name: each.located(self.host.module) for name, each in logged.items()}
        return replace(update, displacement=_NOTHING, buffers=buffers, logged=logged, memory={})

    def _transmit(self, round_: int, update: ClientUpdate) -> str | None:
        """Send an update up; a sentence if what arrives is not finite."""
        if not self.transport.transmit(round_, update):
            return None
        return self.screening.nonfinite_reason(round_, update, " (they were finite when it sent them)")

    def _aggregate(
        self, round_: int, start: Tensor, store: VectorStore, arrived: Sequence[UpdateRecord], *, drawn: int
    ) -> tuple[Mapping[str, float], dict[int, float]]:
        updates = [record.update for record in arrived if record.heard]
        if not arrived or (not updates and self.options.empty_round == "skip"):
            rank_zero_warn(
                f"Nobody was heard in round {round_}: the global model and the rule's state stay as they were."
            )
            self.tally.skipped_rounds += 1
            self.restore_module()
            return {"round_skipped": 1.0}, {}
        rates = self.host.learning_rates(self.layout) if self.rule.needs_learning_rates else ()
        vectors = store.vectors(start, arrived)
        if self.transport.is_summed:
            assert isinstance(vectors, AccumulatedVectors)  # a store that was told so
            with self.tally.phase("channel"):
                self.transport.superpose(vectors, arrived, round_=round_, drawn=drawn)
        cohort = Cohort(
            round=round_,
            clients=torch.tensor([record.update.client for record in arrived]),
            num_examples=torch.tensor([record.update.num_examples for record in arrived]),
            num_steps=torch.tensor([record.update.num_steps for record in arrived]),
            heard=torch.tensor([record.heard for record in arrived]),
            start=start,
            vectors=vectors,
            learning_rates=rates,
            buffers=tuple(record.update.buffers for record in arrived),
            num_batches=torch.tensor([record.update.num_batches for record in arrived]),
        )
        with isolated_randomness(self.host.device):
            # For layers that draw (dropout, augmentation), where a rule trains on the server's data.
            seed_randomness(seed_of(self.seed, "round", round_, "aggregation"), self.host.device)
            step = self.rule.step(cohort, self.rule.state, self.server)
        _check_step(step, type(self.rule).__name__, len(cohort))
        self.server.install(step.parameters, self.buffers.aggregate(cohort, step, updates))
        self.rule.state = dict(step.state)
        if self.options.buffers == "recalibrate" and updates:
            self.buffers.recalibrate(round_, [update.client for update in updates])
        return step.metrics, dict(zip(cohort.clients.tolist(), step.weights.tolist(), strict=True))

    # ------------------------------------------------------------------ the end of a run

    def evaluate_clients(self) -> ClientMetrics:
        """Evaluate the global model on every client's own data."""
        return ClientEvaluation(self.host, self.data, self.ranks, self.seed).evaluate()

    def close(self) -> None:
        """End a run: leave nothing on the model's device.

        What was learned, and what a further ``fit`` or a checkpoint asks for, goes to host memory as it is.
        """
        self.data.release()
        self.engine.close()
        self.server.move(HOST)
        self.rule.move_state(HOST)
        for objective in self.engine.objectives:
            objective.mean = move_data_to_device(objective.mean, HOST)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is not in the module, the rule or another callback: plain values and tensors."""
        return self.run_state.state_dict(self.engine)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If it is of another federation.
        """
        self.run_state.load_state_dict(state, self.engine)


def _check_step(step: Any, rule: str, clients: int) -> None:
    if not isinstance(step, RuleStep):
        raise TypeError(
            f"`{rule}.step` must return a `RuleStep(parameters, state, weights)`, got {type(step).__name__}."
        )
    if step.weights.shape != (clients,):
        raise ValueError(
            f"`{rule}.step` must return one weight per client of the cohort, [{clients}], got"
            f" {list(step.weights.shape)}."
        )

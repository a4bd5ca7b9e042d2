"""A federation: the order of a round, which is the same for any rule, channel and objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

from lightning.fabric.utilities import move_data_to_device

from lightning_fedhaw.channel.base import Channel
from lightning_fedhaw.clients.choice import choose
from lightning_fedhaw.clients.engine import Engine
from lightning_fedhaw.clients.evaluation import ClientMetrics
from lightning_fedhaw.clients.local_parameters import LocalParameters
from lightning_fedhaw.clients.plan import LocalPlan
from lightning_fedhaw.clients.records import merge
from lightning_fedhaw.clients.sequential import SequentialEngine
from lightning_fedhaw.cohort import Cohort
from lightning_fedhaw.data.samplers import CohortSampler
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.federation.checks import check_objectives, check_step, local_lr_scale
from lightning_fedhaw.federation.client_statistics import Spread, spread_in_round
from lightning_fedhaw.federation.cohort_training import CohortTraining
from lightning_fedhaw.federation.context import RunContext
from lightning_fedhaw.federation.full_gradient import FullGradient
from lightning_fedhaw.federation.inquiries import Inquired, Inquiries
from lightning_fedhaw.federation.memory_advice import memory_advice
from lightning_fedhaw.federation.observation import Observation
from lightning_fedhaw.federation.placement import Placement, do_clients_remember
from lightning_fedhaw.federation.probing import Probed, Probing
from lightning_fedhaw.federation.rate_tangents import RateTangentPayload
from lightning_fedhaw.federation.records import Aggregation, Received, Report, RoundPlan, Tally, cohort_of
from lightning_fedhaw.federation.run_state import RoundSnapshot, RunState
from lightning_fedhaw.federation.sampling import Sampling
from lightning_fedhaw.federation.screening import Screening
from lightning_fedhaw.federation.server_parameters import ServerParametersPayload
from lightning_fedhaw.federation.shared_states import SharedStates
from lightning_fedhaw.federation.stores import VectorStore
from lightning_fedhaw.federation.transport import SidePayload, Transport
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.notes import add_note
from lightning_fedhaw.objectives.base import ClientObjective, find_objectives
from lightning_fedhaw.objectives.local_training import LocalTraining
from lightning_fedhaw.streams import seed_of
from lightning_fedhaw.vectors.accumulated import AccumulatedVectors
from lightning_fedhaw.vectors.layout import ParameterLayout
from lightning_fedhaw.vectors.memory import HOST, is_out_of_memory


class Federation:
    """The federation of a run, which runs its rounds.

    The order of a round is here, in :meth:`_run_round`. The state of its steps is kept by collaborators.

    Args:
        context: What all steps of a round work with: the trainer around them, server, data, rule, options, processes.
        sampler: How the clients of a round are sampled.
        callbacks: The trainer's callbacks, from which channels and client objectives are selected in list order.
        local_training: How clients train, for the rule and the objectives.
        limit: Batches a local pass at most.
        cohort_cap: Clients a round at most, for a development run.

    Attributes:
        engine: The engine that trains clients; see :meth:`choose_engine`.
        in_round: Whether a round is running, so that the module may hold a client's model.
        on_round_start: Called with the round's number and the clients that were sampled.
        on_snapshot: Called with what the undo of the round restores, before anything changes.
        on_round_end: Called with the round's report.
    """

    def __init__(
        self,
        context: RunContext,
        sampler: CohortSampler,
        callbacks: Sequence[Any],
        *,
        local_training: LocalTraining,
        limit: int | float | None = None,
        cohort_cap: int | None = None,
    ) -> None:
        self.context = context
        self.host = context.host
        self.server = context.server
        self.data = context.data
        self.rule = context.rule
        self.options = context.options
        self.ranks = context.ranks
        self.seed = context.seed
        self.local_training = local_training
        self.sampling = Sampling(sampler, self.data, self.seed, cohort_cap)
        objectives = find_objectives(callbacks)
        check_objectives(objectives, self.host)
        self.buffers = Buffers(context)
        self.engine: Engine = self._sequential_engine(objectives, limit)
        self.shared_states = SharedStates(context, objectives)
        self.transport = self._make_transport(callbacks)
        clients_remember = do_clients_remember(self.options, self.buffers, self.layout, self.uplink, objectives)
        self.placement = Placement(self.ranks, is_sticky=clients_remember)
        self._prepare_transport(clients_remember)
        self.screening = Screening(self.options, self.buffers, self.rule, self.uplink)
        self.training = CohortTraining(context, self.buffers, self.shared_states, self.transport, self.screening)
        self.probing = Probing(context, self.buffers, self.placement, self.transport, self.sampling)
        self.inquiries = Inquiries(context, self.buffers, self.transport, self.screening)
        self.observation = Observation(self.host, self.server, self.seed)
        self.run_state = self._make_run_state(objectives)
        self.in_round = False
        self.on_round_start: Callable[[int, list[int]], None] = _ignore
        self.on_snapshot: Callable[[RoundSnapshot], None] = _ignore
        self.on_round_end: Callable[[Report], None] = _ignore

    def _sequential_engine(self, objectives: Sequence[ClientObjective], limit: int | float | None) -> SequentialEngine:
        """Make the engine that any module can train with, until another one is chosen."""
        plan = LocalPlan.of(self.options, limit, self.data.num_clients)
        engine = SequentialEngine(self.host, self.layout, self.data, plan, objectives)
        engine.local_parameters = LocalParameters(self.server)
        engine.local_buffers = self.buffers.local
        engine.gradient = FullGradient(self.context, engine.local_parameters).compute
        return engine

    def _make_transport(self, callbacks: Sequence[Any]) -> Transport:
        """Make the transport through the channels, with everything that is sent in addition to models."""
        channels = [callback for callback in callbacks if isinstance(callback, Channel)]
        rate_tangents = RateTangentPayload(self.host, self.server, self.rule, self.engine)
        server_parameters = ServerParametersPayload(self.server, self.rule)
        payloads: list[SidePayload] = [self.buffers, self.shared_states, rate_tangents, server_parameters]
        return Transport(channels, self.layout, payloads, self.seed)

    def _prepare_transport(self, clients_remember: bool) -> None:
        """Describe the federation to the channels."""
        drawn_uniformly = None
        if self.uplink or self.downlink:
            # Only for channels, because it asks the sampler for a cohort.
            drawn_uniformly = self.sampling.uniform_cohort_size()
        self.transport.prepare(
            self.data.num_examples, self.rule, drawn_uniformly=drawn_uniformly, clients_remember=clients_remember
        )

    def _make_run_state(self, objectives: Sequence[ClientObjective]) -> RunState:
        """Make the state of the run, which knows all owners of a part of it."""
        return RunState(
            self.context,
            buffers=self.buffers,
            transport=self.transport,
            objectives=objectives,
            placement=self.placement,
            screening=self.screening,
        )

    # ------------------------------------------------------------------ before a run

    @property
    def layout(self) -> ParameterLayout:
        """Where each trainable parameter lives in the flat vector."""
        return self.server.layout

    @property
    def tally(self) -> Tally:
        """The costs and incidents of the run so far."""
        return self.run_state.tally

    @property
    def uplink(self) -> Sequence[Channel]:
        """The channels from clients to server."""
        return self.transport.uplink

    @property
    def downlink(self) -> Sequence[Channel]:
        """The channels from server to clients."""
        return self.transport.downlink

    def check_agreement(self) -> None:
        """Refuse to continue where processes have different data or another split.

        Raises:
            ValueError: Naming the processes that differ.
        """
        self.run_state.identity.check_agreement()

    def choose_engine(self) -> str:
        """Use the engine that was requested, or that ``engine="auto"`` chooses.

        Returns:
            One line that names the engine and the reason.

        Raises:
            ValueError: If ``engine="vectorized"`` and the module's step has side effects.
        """
        self.engine, reason = choose(
            self.engine,
            self.options.engine,
            cohort=ceil(len(self.cohort(0)) / self.ranks.size),
            chunk_memory=self.options.chunk_memory,
            compile_clients=self.options.compile_clients,
            share_calls=self.options.share_calls,
            processes=self.ranks.size,
        )
        return reason

    def cohort(self, round_idx: int) -> list[int]:
        """Draw the clients of a round; see :meth:`Sampling.cohort`."""
        return self.sampling.cohort(round_idx)

    # ------------------------------------------------------------------ a round

    def remember(self) -> RoundSnapshot:
        """Remember the state between two rounds, with what the user's code has changed since the last one."""
        self.run_state.adopt_changes()
        snapshot = self.run_state.snapshot(self.engine)
        self.on_snapshot(snapshot)
        return snapshot

    def run_round(self, round_idx: int) -> Report:
        """Run one communication round. If it fails, it is undone.

        Raises:
            FloatingPointError: If a client returns NaN or infinity and ``on_nonfinite="raise"``, or if every client
                that was received does, in this round or in too many rounds in a row.
        """
        clients = self.cohort(round_idx)
        self.on_round_start(round_idx, clients)
        self.local_training.show(self.rule, *self.engine.objectives)
        snapshot = self.remember()
        self.in_round = True
        try:
            return self._run_round(round_idx, clients)
        except BaseException as error:
            # An interrupted round (Ctrl+C) is undone like one that failed.
            if is_out_of_memory(error):
                summed = self.transport.is_summed
                add_note(error, memory_advice(self.host.device, self.data, self.rule, self.options, is_summed=summed))
            self.run_state.restore(self.engine, snapshot)
            raise
        finally:
            self.in_round = False

    def _run_round(self, round_idx: int, clients: Sequence[int]) -> Report:
        with self.tally.phase("broadcast"):
            plan = self._broadcast(round_idx, clients)
            own_clients = self.placement.assign(plan.slots, self.engine.cost)
        self.engine.lr_scale = local_lr_scale(self.rule, self.layout, self.engine.objectives)
        share = self.training.share(plan, own_clients, self.engine, self.tally)
        inquiry = self.rule.inquiry(self.rule.state, self.server)
        trains = inquiry is None or not inquiry.replaces_training
        received = self.training.run(share, trains=trains)
        plan = plan.without(self.engine.absent)
        if trains:
            self.screening.check_round(plan, received)
        with self.tally.phase("local training"):
            inquired = self.inquiries.run(inquiry, plan, received, self.engine, self.tally)
        probed = self.probing.at_start(plan, self.engine, self.tally)
        with self.tally.phase("aggregation"):
            aggregation = self._aggregate(plan, received, share.stores.displacements, inquired)
            if trains:
                self.shared_states.aggregate(plan.start, share.stores.shared, received.from_clients)
        probed = self.probing.at_end(plan, self.engine, self.tally, aggregation.metrics, probed)
        # A rule on the server, or the recalibration of buffers, may have run the module's step.
        self.engine.attributes.restore()
        # In larger batches than those of training, which may be many small ones.
        spread = spread_in_round(
            self.options, round_idx, self.tally, lambda: self.evaluate_clients(self.host.validation.batch_size)
        )
        report = self._report(plan, received, aggregation, probed, inquired, spread)
        self.on_round_end(report)
        return report

    # ------------------------------------------------------------------ the steps of a round, in their order

    def _broadcast(self, round_idx: int, clients: Sequence[int]) -> RoundPlan:
        """Send the global model to the clients, and draw which updates will be lost."""
        start = self.server.parameters()
        broadcast = self.transport.broadcast(round_idx, clients, start)
        if self.transport.may_be_outdated:
            self.shared_states.record_broadcast(broadcast.up_to_date)
        lost = self.transport.uplink_outages(round_idx, list(broadcast.models))
        factors = self.sampling.inverse_probabilities(clients)
        return RoundPlan(round_idx, clients, start, broadcast.models, lost, factors, broadcast.outdated)

    def _aggregate(self, plan: RoundPlan, received: Received, store: VectorStore, inquired: Inquired) -> Aggregation:
        """Let the rule compute a new global model from the cohort, and install it."""
        if self.screening.must_skip(plan, received):
            self.tally.skipped_rounds += 1
            # The module may hold a client's model.
            self.server.write(self.server.parameters(), self.server.buffers)
            return Aggregation({"round_skipped": 1.0}, {})
        cohort = self._receive(plan, received, store, inquired)
        with isolated_randomness(self.host.device):
            # Rules that train on the server's data may use layers that draw (dropout, augmentation).
            seed_randomness(seed_of(self.seed, "round", plan.round, "aggregation"), self.host.device)
            step = self.rule.step(cohort, self.rule.state, self.server)
        check_step(step, type(self.rule).__name__, len(cohort))
        self.server.install(step.parameters, self.buffers.aggregate(cohort, step, received.updates))
        self.rule.state = dict(step.state)
        self.server.write_server_parameters(self.rule.server_parameters(self.rule.state))
        self.buffers.complete(plan.round, received.updates)
        weights = dict(zip(cohort.clients.tolist(), step.weights.tolist(), strict=True))
        if inquired.replaced_training:
            # There are no updates to observe.
            return Aggregation({**step.metrics, **inquired.metrics}, weights)
        observed = self.observation.of(cohort, step)
        return Aggregation({**step.metrics, **inquired.metrics, **observed.numbers}, weights, observed.tables)

    def _receive(self, plan: RoundPlan, received: Received, store: VectorStore, inquired: Inquired) -> Cohort:
        """Make the cohort that the rule reads from the updates that the server has received."""
        learning_rates: tuple[float, ...] = ()
        if self.rule.needs_learning_rates:
            learning_rates = self.host.learning_rates(self.layout)
        vectors = store.vectors(plan.start, received.records)
        if self.transport.is_summed:
            # The store of a cohort that is summed returns these.
            assert isinstance(vectors, AccumulatedVectors)
            with self.tally.phase("channel"):
                self.transport.superpose(vectors, received.records, round_idx=plan.round, drawn=len(plan.clients))
        tangents = store.rate_tangents(plan.start, received.records)
        return cohort_of(plan, received, vectors, learning_rates, self.rule, tangents, inquired.answers)

    def _report(
        self,
        plan: RoundPlan,
        received: Received,
        aggregation: Aggregation,
        probed: Probed,
        inquired: Inquired,
        spread: Spread,
    ) -> Report:
        """Count the costs of the round, and make its report."""
        updates = received.updates
        lr_scale_bytes = 0
        if self.engine.lr_scale is not None:
            lr_scale_bytes = self.engine.lr_scale.numbers_sent * self.layout.dtype.itemsize
        bytes_down = self.transport.sent_bytes("downlink", plan.round, plan.clients)
        bytes_down += len(plan.clients) * lr_scale_bytes + probed.bytes_down + inquired.bytes_down
        bytes_up = probed.bytes_up + inquired.bytes_up
        if not inquired.replaced_training:
            bytes_up += self.transport.sent_bytes("uplink", plan.round, [update.client for update in updates])
        self.tally.count_round(plan, updates, bytes_down=bytes_down, bytes_up=bytes_up)
        metrics = {
            **aggregation.metrics,
            **probed.metrics,
            **spread.numbers,
            "clients_received": float(len(updates)),
            "bytes_down": float(bytes_down),
            "bytes_up": float(bytes_up),
        }
        logged = merge(update.logged for update in updates)
        tables = {**aggregation.tables, **spread.tables}
        return Report(plan.round, plan.clients, metrics, logged, aggregation.weights, tables)

    # ------------------------------------------------------------------ the end of a run, and checkpoints

    def evaluate_clients(self, batch_size: int | None = None) -> ClientMetrics:
        """Evaluate the global model on every client's own data, with the client's own local parameters.

        Args:
            batch_size: Samples in a batch; ``None`` for those of training.
        """
        return self.engine.evaluate(self.run_state.own_tensors_of_all(self.engine), self.ranks, batch_size)

    def close(self) -> None:
        """End a run, and release the memory of the model's device.

        The state that a further ``fit`` or a checkpoint needs is moved to host memory in its own dtypes.
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

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Resume from a checkpoint, whose name is ``source``.

        Raises:
            ValueError: If it is of another federation, or cannot be read.
        """
        self.run_state.load_state_dict(state, self.engine, source)


def _ignore(*arguments: object) -> None:
    """Observe nothing."""

"""The inquiries of a rule: what clients compute in addition to their updates, or instead of them.

Shapes: P trainable parameters, U parameters that only the server changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite

import torch
from torch import Tensor

from lightning_fedhaw.channel.base import Link
from lightning_fedhaw.clients.engine import Engine
from lightning_fedhaw.clients.steps import Host, turns
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.data.client_data import Batch as ClientBatch
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.federation.checks import check_held_out, check_inquiring
from lightning_fedhaw.federation.local_problem import BilevelLosses, ClientProblem, SizedBatch
from lightning_fedhaw.federation.probe_batches import with_larger_batches
from lightning_fedhaw.federation.records import Received, RoundPlan, Tally, UpdateRecord
from lightning_fedhaw.federation.sample_rows import SampleRows
from lightning_fedhaw.federation.screening import Screening
from lightning_fedhaw.federation.stores import VectorStore, make_sum
from lightning_fedhaw.federation.transport import Transport
from lightning_fedhaw.federation.weight_decay import weight_decay
from lightning_fedhaw.inquiry import Answer, Answers, Inquiry
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.options import FederationOptions
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.server import Server, all_finite
from lightning_fedhaw.streams import seed_of
from lightning_fedhaw.vectors.accumulated import AccumulatedVectors
from lightning_fedhaw.vectors.layout import ParameterLayout


class ServerParametersPayload:
    """The parameters that only the server changes, which clients are sent with the model.

    Args:
        server: The global model.
        rule: The aggregation rule, which has the values.
    """

    links: Sequence[Link] = ("downlink",)

    def __init__(self, server: Server, rule: Rule) -> None:
        self.server = server
        self.rule = rule

    @property
    def message_bytes(self) -> int:
        """Bytes in addition to a model."""
        total = 0
        for name in self.rule.server_parameters(self.rule.state):
            if name in self.rule.client_placed:
                continue
            parameter = self.server.module.get_parameter(name)
            total += parameter.numel() * parameter.element_size()
        return total

    @property
    def contents(self) -> list[str]:
        """Nothing: clients do not send them."""
        return []


@dataclass(frozen=True)
class Inquired:
    """The outcome of a round's inquiry.

    Attributes:
        answers: The answers; ``None`` without an inquiry, or if nobody answered.
        metrics: Numbers for the log.
        bytes_down: Bytes that were sent for it.
        bytes_up: Bytes of the answers.
        replaced_training: Whether clients have answered instead of training.
    """

    answers: Answers | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    replaced_training: bool = False


@dataclass(frozen=True)
class _ShareOfAnswers:
    """The answers that one process has computed.

    Attributes:
        records: One record an answer.
        numbers: The numbers of each answer, by name.
        rms: The root mean square of each vector of each answer, by name, where a channel acts on the sum.
        excluded: A sentence for each client whose answer is not finite.
    """

    records: list[UpdateRecord]
    numbers: list[dict[str, float]]
    rms: list[dict[str, float]]
    excluded: list[tuple[int, str]]


class Inquiries:
    """The inquiries of a rule that makes some; nothing happens for other rules.

    Each vector takes the channels of the run with draws of its own, and without what channels keep from round to round,
    such as error feedback, which belongs to the updates. No message is lost for itself: an answer arrives with the
    client's update or, in a round without training, as an update would.

    Args:
        host: The trainer around the federation.
        server: The global model.
        rule: The aggregation rule.
        options: The federation's arguments.
        buffers: The policy for buffers, which knows those that a client starts from.
        data: The clients' data.
        transport: The channels of the updates.
        screening: Ends the run where all answers are excluded.
        ranks: The processes.
        seed: The federation's seed.

    Raises:
        ValueError: If the rule needs held-out samples of every client, and a client has none; or if a channel or the
            module does not allow inquiries.
    """

    def __init__(
        self,
        host: Host,
        server: Server,
        rule: Rule,
        options: FederationOptions,
        buffers: Buffers,
        data: ClientData,
        transport: Transport,
        screening: Screening,
        ranks: Ranks,
        seed: int,
    ) -> None:
        self.host = host
        self.server = server
        self.rule = rule
        self.options = options
        self.buffers = buffers
        self.data = data
        self.ranks = ranks
        self.seed = seed
        self.screening = screening
        self.transport = transport
        self._transports: dict[tuple[str, ParameterLayout], Transport] = {}
        self._passes: dict[bool, ClientData] = {}
        self._rows: SampleRows | None = None
        if type(rule).inquiry is Rule.inquiry:
            return
        check_inquiring(rule, host, buffers)
        if rule.needs_held_out_data:
            check_held_out(rule, data)
        if rule.client_placed:
            self._rows = SampleRows(data, {name: len(server.module.get_parameter(name)) for name in rule.client_placed})
        # A channel that does not take such messages says so now, and not in the middle of the run.
        self._transport("inquiry", server.layout)

    # ------------------------------------------------------------------ one inquiry

    def run(
        self, inquiry: Inquiry | None, plan: RoundPlan, received: Received, engine: Engine, tally: Tally
    ) -> Inquired:
        """Let the clients whose updates were received answer, and average their answers.

        Args:
            inquiry: What the rule asks for; ``None`` for nothing.
            plan: The plan of the round.
            received: The updates of all processes, which say whose answers arrive.
            engine: The engine, which knows the clients' local work and own parameters.
            tally: Counts answers, and the products with second derivatives that they take.

        Raises:
            FloatingPointError: If an answer is not finite and ``on_nonfinite="raise"``.
        """
        if inquiry is None:
            return Inquired()
        # A client that trains an outdated model did not receive what is sent with this round's.
        asked = [record for record in received.from_clients if record.update.client not in plan.outdated]
        own = [record for record in asked if record.rank == self.ranks.rank]
        if self._rows is None and inquiry.placed:
            self._rows = SampleRows(self.data, _rows_of(inquiry.placed))
        layouts = {**inquiry.vectors, **inquiry.placed}
        stores = {name: self._store(layout, len(own)) for name, layout in layouts.items()}
        shares = self.ranks.exchange(lambda: self._own_answers(inquiry, plan, own, stores, engine))
        answered: dict[int, UpdateRecord] = {}
        numbers_of: dict[int, Mapping[str, float]] = {}
        rms_of: dict[int, Mapping[str, float]] = {}
        excluded: dict[int, str] = {}
        for share in shares:
            for record, own_numbers, own_rms in zip(share.records, share.numbers, share.rms, strict=True):
                answered[record.update.client] = record
                numbers_of[record.update.client] = own_numbers
                rms_of[record.update.client] = own_rms
            excluded.update(share.excluded)
        # The order of the cohort, for any number of processes.
        records = [answered[record.update.client] for record in asked if record.update.client in answered]
        clients = [record.update.client for record in records]
        tally.nonfinite_answers += len(excluded)
        self.screening.check_answers(plan, Received(records, excluded))
        bytes_down, bytes_up = self._bytes(inquiry, plan, clients)
        metrics = {"answers": float(len(records))}
        if not records:
            return Inquired(None, metrics, bytes_down, bytes_up, inquiry.replaces_training)
        tally.answers += len(records)
        tally.second_derivatives += len(records) * inquiry.products
        weights = torch.tensor([record.unnormalized_weight for record in records], dtype=torch.float64)
        weights = weights / weights.sum()
        vectors: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        for name, layout in inquiry.placed.items():
            assert self._rows is not None
            vectors[name] = self._sum(layout, stores[name], records)
            rows[name] = self._rows.mask(clients, layout, vectors[name].device)
        for name in inquiry.vectors:
            store = stores[name]
            named = [replace(record, rms=rms_of[record.update.client][name]) for record in records]
            vectors[name] = self._mean(inquiry, plan, name, store, named, weights)
        numbers = _mean_numbers([numbers_of[client] for client in clients], weights)
        answers = Answers(vectors, numbers, len(records), rows)
        return Inquired(answers, metrics, bytes_down, bytes_up, inquiry.replaces_training)

    def _store(self, layout: ParameterLayout, capacity: int) -> VectorStore:
        """Make a store of the weighted sum of one vector of the answers."""
        zeros = torch.zeros(layout.numel, dtype=layout.dtype, device=self.server.parameters().device)
        return make_sum(self.rule, self.options, zeros, capacity, self.ranks)

    def _own_answers(
        self,
        inquiry: Inquiry,
        plan: RoundPlan,
        own: Sequence[UpdateRecord],
        stores: Mapping[str, VectorStore],
        engine: Engine,
    ) -> _ShareOfAnswers:
        """Compute the answers of this process's clients, and send them up."""
        share = _ShareOfAnswers([], [], [], [])
        if not own:
            return share
        self._settle_passes(engine)
        sent = self._send_down(inquiry, plan.round, [record.update.client for record in own])
        decay = weight_decay(self.host.module, self.host.optimizers, self.server.layout)
        with turns(self.host):
            for record in own:
                client = record.update.client
                self.host.stop_if_asked()
                self.host.client = client
                with isolated_randomness(self.host.device):
                    problem = replace(self._problem(inquiry, plan, client, engine), decay=decay)
                    answer = inquiry.answer(problem, {name: vectors[client] for name, vectors in sent.items()})
                numbers = {name: float(value) for name, value in answer.items() if name not in stores}
                rms = None
                if all(map(isfinite, numbers.values())):
                    rms = self._send_up(inquiry, plan.round, record, answer, stores)
                if rms is None:
                    share.excluded.append((client, self._nonfinite_sentence(inquiry, plan.round, client)))
                    continue
                share.records.append(record)
                share.rms.append(rms)
                share.numbers.append(numbers)
        return share

    def _send_down(self, inquiry: Inquiry, round_idx: int, clients: Sequence[int]) -> dict[str, Mapping[int, Tensor]]:
        """Send the vectors of an inquiry to clients, and return what each received, by name."""
        sent: dict[str, Mapping[int, Tensor]] = {}
        for name, (vector, layout) in inquiry.sent.items():
            sent[name] = self._transport(f"{name} down", layout).deliver(round_idx, clients, vector)
        return sent

    def _send_up(
        self,
        inquiry: Inquiry,
        round_idx: int,
        record: UpdateRecord,
        answer: Answer,
        stores: Mapping[str, VectorStore],
    ) -> dict[str, float] | None:
        """Send one client's answer up and store it.

        Returns:
            The root mean square of each of its vectors, by name; ``None`` if the answer is not finite.
        """
        received: list[tuple[VectorStore, ClientUpdate, float]] = []
        rms: dict[str, float] = {}
        for name, store in stores.items():
            vector = answer[name]
            assert isinstance(vector, Tensor)
            update = replace(record.update, displacement=vector)
            if name in inquiry.placed:
                if not all_finite(vector):
                    return None
                assert self._rows is not None
                self._rows.check(update.client, inquiry.placed[name], vector)
                received.append((store, update, 1.0))
                continue
            transport = self._transport(f"{name} up", inquiry.vectors[name])
            if all_finite(vector):
                transport.transmit(round_idx, update)
            if not all_finite(update.displacement):
                return None
            rms[name] = transport.rms(update)
            received.append((store, update, record.unnormalized_weight))
        # Only a whole answer is added to the sums.
        for store, update, weight in received:
            store.commit(update, weight)
        return rms

    def _nonfinite_sentence(self, inquiry: Inquiry, round_idx: int, client: int) -> str:
        sentence = f"The answer of client {client} ({inquiry.name}) in round {round_idx} is not finite"
        if self.options.on_nonfinite == "raise":
            raise FloatingPointError(
                f'{sentence}, and `on_nonfinite="raise"` ends the run. Lower the rates of the lower problem, or set'
                ' `on_nonfinite="exclude"`.'
            )
        return sentence

    def _sum(self, layout: ParameterLayout, store: VectorStore, records: Sequence[UpdateRecord]) -> Tensor:
        """Return the sum of what clients keep, each of whom has filled rows of its own."""
        start = torch.zeros(layout.numel, dtype=layout.dtype, device=self.server.parameters().device)
        vectors = store.vectors(start, [replace(record, unnormalized_weight=1.0) for record in records])
        assert isinstance(vectors, AccumulatedVectors)
        return vectors.total

    def _mean(
        self,
        inquiry: Inquiry,
        plan: RoundPlan,
        name: str,
        store: VectorStore,
        records: Sequence[UpdateRecord],
        weights: Tensor,
    ) -> Tensor:
        """Return the weighted mean of one vector of the answers."""
        layout = inquiry.vectors[name]
        start = torch.zeros(layout.numel, dtype=layout.dtype, device=self.server.parameters().device)
        vectors = store.vectors(start, records)
        assert isinstance(vectors, AccumulatedVectors)
        transport = self._transport(f"{name} up", layout)
        if transport.is_summed:
            transport.superpose(vectors, records, round_idx=plan.round, drawn=len(plan.clients))
        return vectors.displacements.weighted_sum(weights)

    # ------------------------------------------------------------------ messages

    def _transport(self, name: str, layout: ParameterLayout) -> Transport:
        """Return the transport of one vector, whose channels forget earlier messages."""
        transport = self._transports.get((name, layout))
        if transport is None:
            sizes = self.data.num_examples
            transport = self.transport.for_further_messages(layout, sizes, self.rule, "inquiry", name)
            self._transports[name, layout] = transport
        transport.forget()
        return transport

    def _bytes(self, inquiry: Inquiry, plan: RoundPlan, clients: Sequence[int]) -> tuple[int, int]:
        """Count the bytes that were sent down to all clients of the round, and up by those that answered."""
        down = 0
        for name, (_, layout) in inquiry.sent.items():
            down += self._transport(f"{name} down", layout).sent_bytes("downlink", plan.round, plan.clients)
        up = 0
        for name, layout in inquiry.vectors.items():
            up += self._transport(f"{name} up", layout).sent_bytes("uplink", plan.round, clients)
        return down, up

    # ------------------------------------------------------------------ a client's problem

    def _problem(self, inquiry: Inquiry, plan: RoundPlan, client: int, engine: Engine) -> ClientProblem:
        """Make the problem of one client at the model that it received."""
        layout, upper = self._upper()
        losses = BilevelLosses(self.server, layout, self.rule.upper_loss)
        name = ("client", client, "round", plan.round, "inquiry")
        return ClientProblem(
            losses=losses,
            lower=plan.models[client],
            upper=upper,
            own={"buffers": self.buffers.start(client), "local_parameters": engine.local_parameters.start(client)},
            seed=lambda number: seed_randomness(seed_of(self.seed, *name, number), self.host.device),
            training=partial(self._training_pass, client, plan.round, engine),
            held_out=partial(self._held_out_pass, client, plan.round, engine),
            local_training=partial(self._local_training, client, plan.round, engine),
        )

    def _upper(self) -> tuple[ParameterLayout, Tensor]:
        """Return the layout of the parameters that only the server changes, and their values ``[U]``."""
        values = self.rule.server_parameters(self.rule.state)
        # In the module's dtypes: the rule may keep the values in a wider one.
        layout = ParameterLayout.of_tensors({name: self.server.module.get_parameter(name) for name in values})
        return layout, layout.read(list(values.values()))

    def _training_pass(self, client: int, round_idx: int, engine: Engine) -> Iterator[SizedBatch]:
        """Make one pass over a client's training samples."""
        data = self._passes[False]
        return self._prepared(data.typical_pass(client, round_idx, limit=engine.plan.limit))

    def _held_out_pass(self, client: int, round_idx: int, engine: Engine) -> Iterator[SizedBatch]:
        """Make one pass over a client's held-out samples."""
        data = self._passes[True]
        return self._prepared(data.full_pass(client, round_idx, held_out=True, limit=engine.plan.limit))

    def _settle_passes(self, engine: Engine) -> None:
        """Choose how samples are read, once a run: in larger batches where they give the same gradients."""
        if self._passes:
            return
        self._passes[False] = with_larger_batches(self.data, self._gradients, held_out=False, limit=engine.plan.limit)
        if not self.rule.needs_held_out_data:
            return
        # As validation reads them, without what is for training only, such as augmentation.
        held_out = self.data.for_evaluation(self.host.validation.collate_fn)
        held_out.settings = replace(held_out.settings, drop_last=False)
        gradients = partial(self._gradients, held_out=True)
        self._passes[True] = with_larger_batches(held_out, gradients, held_out=True, limit=engine.plan.limit)

    def _gradients(self, client: int, batches: Iterable[ClientBatch], *, held_out: bool = False) -> Sequence[Tensor]:
        """Return the gradients ``[P]`` and ``[U]`` of one of the losses over some batches, at the global model."""
        layout, upper = self._upper()
        problem = ClientProblem(
            losses=BilevelLosses(self.server, layout, self.rule.upper_loss),
            lower=self.server.parameters(),
            upper=upper,
            own={"buffers": self.server.buffers, "local_parameters": self.server.local_parameters},
            seed=lambda _: seed_randomness(seed_of(self.seed, "inquiry", "batch size"), self.host.device),
            training=lambda: self._prepared(batches),
            held_out=lambda: self._prepared(batches),
            local_training=lambda: (),
        )
        with isolated_randomness(self.host.device), turns(self.host):
            self.host.client = client
            if not held_out:
                return problem.lower_gradients()
            gradients = problem.upper_gradients()
            return gradients.lower, gradients.upper

    def _local_training(self, client: int, round_idx: int, engine: Engine) -> Iterator[SizedBatch]:
        """Make the batches of a client's local training in a round."""
        plan = engine.plan
        epochs = plan.epochs_of(client)
        steps = plan.steps_of(client)
        return self._prepared(self.data.batches(client, round_idx, epochs=epochs, num_batches=steps, limit=plan.limit))

    def _prepared(self, batches: Iterable[ClientBatch]) -> Iterator[SizedBatch]:
        """Move batches to the model's device, each when it is asked for."""
        for batch in batches:
            yield self.host.prepare(batch.data), batch.index, batch.size


def note_idle_round(engine: Engine, host: Host) -> None:
    """Let an engine note a round in which nobody trains, whose learning rates and schedules move on all the same."""
    # Without tasks, as in a process that trains nobody, it notes the state of schedules.
    list(engine.run(iter(())))
    for optimizer in host.optimizers:
        # A schedule steps after this round too, and would warn that no optimizer has.
        optimizer._opt_called = True  # type: ignore[attr-defined]


def _rows_of(layouts: Mapping[str, ParameterLayout]) -> dict[str, int]:
    """Count the rows of each parameter of some layouts, by the parameter's name."""
    num_rows: dict[str, int] = {}
    for layout in layouts.values():
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            num_rows[name] = shape[0]
    return num_rows


def _mean_numbers(numbers: Sequence[Mapping[str, float]], weights: Tensor) -> dict[str, float]:
    """Return the weighted mean of each number of the answers, by name; ``weights`` is ``[K]`` and sums to one."""
    means: dict[str, float] = {}
    for name in numbers[0]:
        values = torch.tensor([own[name] for own in numbers], dtype=torch.float64)
        means[name] = float(weights @ values)
    return means

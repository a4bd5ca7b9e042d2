"""The inquiries of a rule: what clients compute in addition to their updates, or instead of them.

Shapes: P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite

import torch
from torch import Tensor

from lightning_fedhaw.clients.engine import Engine
from lightning_fedhaw.clients.steps import turns
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.federation.checks import check_held_out, check_inquiring
from lightning_fedhaw.federation.client_problems import ClientProblems
from lightning_fedhaw.federation.context import RunContext
from lightning_fedhaw.federation.records import Received, RoundPlan, Tally, UpdateRecord
from lightning_fedhaw.federation.sample_rows import SampleRows
from lightning_fedhaw.federation.screening import Screening
from lightning_fedhaw.federation.stores import VectorStore, make_sum
from lightning_fedhaw.federation.transport import Transport
from lightning_fedhaw.inquiry import Answer, Answers, Inquiry
from lightning_fedhaw.isolation import isolated_randomness
from lightning_fedhaw.rule import Rule
from lightning_fedhaw.vectors.accumulated import AccumulatedVectors
from lightning_fedhaw.vectors.kernels import all_finite
from lightning_fedhaw.vectors.layout import ParameterLayout


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
class _ReceivedAnswer:
    """What all processes know of one client's answer.

    Attributes:
        record: The record of the client's update, with which its answer arrives.
        numbers: The numbers of the answer, by name.
        rms: The root mean square of each of its vectors, by name, where a channel acts on the sum.
    """

    record: UpdateRecord
    numbers: dict[str, float]
    rms: dict[str, float]


@dataclass(frozen=True)
class _ShareOfAnswers:
    """The answers that one process has computed.

    Attributes:
        answers: The answers that were received.
        excluded: A sentence for each client whose answer is not finite.
    """

    answers: list[_ReceivedAnswer]
    excluded: dict[int, str]


class Inquiries:
    """The inquiries of a rule that makes some; nothing happens for other rules.

    Each vector takes the channels of the run with draws of its own, and without what channels keep from round to round,
    such as error feedback, which belongs to the updates. No message is lost for itself: an answer arrives with the
    client's update or, in a round without training, as an update would.

    Args:
        context: What all steps of a round work with.
        buffers: The policy for buffers, which knows those that a client starts from.
        transport: The channels of the updates.
        screening: Ends the run where all answers are excluded.

    Raises:
        ValueError: If the rule needs held-out samples of every client, and a client has none; or if a channel or the
            module does not allow inquiries.
    """

    def __init__(self, context: RunContext, buffers: Buffers, transport: Transport, screening: Screening) -> None:
        rule = context.rule
        server = context.server
        self.host = context.host
        self.server = server
        self.rule = rule
        self.options = context.options
        self.data = context.data
        self.ranks = context.ranks
        self.screening = screening
        self.transport = transport
        self.problems = ClientProblems(context, buffers)
        self._transports: dict[tuple[str, ParameterLayout], Transport] = {}
        self._rows: SampleRows | None = None
        if type(rule).inquiry is Rule.inquiry:
            return
        check_inquiring(rule, self.host, buffers)
        if rule.needs_held_out_data:
            check_held_out(rule, self.data)
        if rule.client_placed:
            num_rows = {name: len(server.module.get_parameter(name)) for name in rule.client_placed}
            self._rows = SampleRows(self.data, num_rows)
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
        answers, excluded = _in_order(asked, shares)
        tally.nonfinite_answers += len(excluded)
        self.screening.check_answers(plan, Received([answer.record for answer in answers], excluded))
        bytes_down, bytes_up = self._bytes(inquiry, plan, [answer.record.update.client for answer in answers])
        averaged = None
        if answers:
            tally.answers += len(answers)
            tally.second_derivatives += len(answers) * inquiry.products
            averaged = self._average(inquiry, plan, answers, stores)
        metrics = {"answers": float(len(answers))}
        return Inquired(averaged, metrics, bytes_down, bytes_up, inquiry.replaces_training)

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
        share = _ShareOfAnswers([], {})
        if not own:
            return share
        self.problems.begin_round(engine)
        sent = self._send_down(inquiry, plan.round, [record.update.client for record in own])
        with turns(self.host):
            for record in own:
                client = record.update.client
                self.host.stop_if_asked()
                self.host.client = client
                with isolated_randomness(self.host.device):
                    problem = self.problems.of(client, plan, engine)
                    answer = inquiry.answer(problem, {name: vectors[client] for name, vectors in sent.items()})
                numbers = {name: float(value) for name, value in answer.items() if name not in stores}
                rms = None
                if all(map(isfinite, numbers.values())):
                    rms = self._send_up(inquiry, plan.round, record, answer, stores)
                if rms is None:
                    share.excluded[client] = self._nonfinite_sentence(inquiry, plan.round, client)
                    continue
                share.answers.append(_ReceivedAnswer(record, numbers, rms))
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

    def _average(
        self,
        inquiry: Inquiry,
        plan: RoundPlan,
        answers: Sequence[_ReceivedAnswer],
        stores: Mapping[str, VectorStore],
    ) -> Answers:
        """Return the weighted means of the answers, and the sums of the parameters that clients hold rows of.

        Args:
            inquiry: What the rule asked for.
            plan: The plan of the round.
            answers: The answers that were received, at least one, in the cohort's order.
            stores: Their vectors, by name.
        """
        records = [answer.record for answer in answers]
        clients = [record.update.client for record in records]
        weights = torch.tensor([record.unnormalized_weight for record in records], dtype=torch.float64)
        weights = weights / weights.sum()
        vectors: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        for name, layout in inquiry.placed.items():
            assert self._rows is not None
            vectors[name] = self._sum(layout, stores[name], records)
            rows[name] = self._rows.mask(clients, layout, vectors[name].device)
        for name in inquiry.vectors:
            named = [replace(answer.record, rms=answer.rms[name]) for answer in answers]
            vectors[name] = self._mean(inquiry, plan, name, stores[name], named, weights)
        numbers = _mean_numbers([answer.numbers for answer in answers], weights)
        return Answers(vectors, numbers, len(records), rows)

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


def _in_order(
    asked: Sequence[UpdateRecord], shares: Sequence[_ShareOfAnswers]
) -> tuple[list[_ReceivedAnswer], dict[int, str]]:
    """Merge the answers of all processes.

    Returns:
        The answers in the order of the clients that were asked, for any number of processes; and a sentence for each
        client whose answer is left out.
    """
    answer_of: dict[int, _ReceivedAnswer] = {}
    excluded: dict[int, str] = {}
    for share in shares:
        for answer in share.answers:
            answer_of[answer.record.update.client] = answer
        excluded.update(share.excluded)
    clients = [record.update.client for record in asked]
    return [answer_of[client] for client in clients if client in answer_of], excluded


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

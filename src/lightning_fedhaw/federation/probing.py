"""The probe of a round: a second cohort that sends loss and gradient of the global model, for rules that learn by them.

Shapes: C clients have answered, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_fedhaw.clients.engine import Engine
from lightning_fedhaw.clients.steps import turns
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.data.client_data import Batch as ClientBatch
from lightning_fedhaw.federation.buffers import Buffers
from lightning_fedhaw.federation.checks import check_probing
from lightning_fedhaw.federation.context import RunContext
from lightning_fedhaw.federation.placement import Placement
from lightning_fedhaw.federation.probe_batches import with_batch_size, with_larger_batches
from lightning_fedhaw.federation.records import RoundPlan, Tally, UpdateRecord
from lightning_fedhaw.federation.sampling import Sampling
from lightning_fedhaw.federation.stores import VectorStore, make_sum
from lightning_fedhaw.federation.transport import Transport
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.probe import Probe, ProbeForm, ProbeResult
from lightning_fedhaw.rule import Batch, State
from lightning_fedhaw.streams import seed_of, stream
from lightning_fedhaw.vectors.accumulated import AccumulatedVectors
from lightning_fedhaw.vectors.kernels import all_finite

_NO_VECTOR = torch.empty(0)


@dataclass(frozen=True)
class Probed:
    """The outcome of a round's probe.

    Attributes:
        metrics: Numbers for the log; empty if the round had no probe.
        bytes_down: Bytes that were sent to its clients.
        bytes_up: Bytes that they sent.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True)
class _Question:
    """What the clients of a probe were sent.

    Attributes:
        round: The round's number.
        model: ``[P]``, the global parameters.
        drawn: The clients that were asked.
        models: The model ``[P]`` that each of them received; one that received nothing is absent.
        sent_to: The clients that were sent the model for this purpose.
    """

    round: int
    model: Tensor
    drawn: Sequence[int]
    models: Mapping[int, Tensor]
    sent_to: Sequence[int]


@dataclass(frozen=True)
class _Answers:
    """The answers that one process has computed.

    Attributes:
        records: One record an answer, whose ``initial_loss`` is the loss.
        excluded: A sentence for each answer that is not finite.
    """

    records: list[UpdateRecord]
    excluded: list[str]


class Probing:
    """The probe of a rule that asks for one; nothing happens for other rules.

    It has no state that a checkpoint would need: its clients are drawn by the round's number, what is learned is in the
    rule's state, and the size of its batches is found out again. Messages take the channels of the run, with draws of
    their own and without what channels keep from round to round, such as error feedback, which belongs to the updates.

    Args:
        context: What all steps of a round work with.
        buffers: The policy for buffers, which are sent to clients with the model.
        placement: The process of each client.
        transport: The channels of the updates.
        sampling: The draw of the clients of each round.
    """

    def __init__(
        self, context: RunContext, buffers: Buffers, placement: Placement, transport: Transport, sampling: Sampling
    ) -> None:
        host = context.host
        server = context.server
        rule = context.rule
        self.host = host
        self.server = server
        self.rule = rule
        self.options = context.options
        self.ranks = context.ranks
        self.seed = context.seed
        self.data = context.data
        self.buffers = buffers
        self.placement = placement
        self.cohort_cap = sampling.cohort_cap
        probe = rule.probe
        if probe is None:
            return
        check_probing(rule, host)
        if probe.batch_size is not None:
            self.data = with_batch_size(self.data, probe.batch_size)
        self._is_size_open = probe.batch_size is None and probe.source != "proxy"
        self._check_source(probe)
        self.transport = transport.for_further_messages(
            server.layout, self.data.num_examples, rule, "probe", has_channels=probe.source != "proxy"
        )

    def _check_source(self, probe: Probe) -> None:
        """Refuse a probe of data that is not there."""
        name = type(self.rule).__name__
        if probe.source == "proxy":
            self.server.check_proxy(name, lambda vector, batch: self.server.loss(vector, batch))
            return
        candidates = self._candidates(probe)
        if not candidates:
            raise ValueError(
                f'`{name}` probes held-out data (`Probe("validation")`), and no client has any. Hold some out by'
                ' `client_val_fraction=` or `client_val=`, or use `Probe("training")`.'
            )
        if probe.num_clients is not None and probe.num_clients > len(candidates):
            raise ValueError(
                f"`num_clients`={probe.num_clients} of `{name}`'s probe is more than the {len(candidates)} clients that"
                f" have {probe.source} data. Ask for at most {len(candidates)}."
            )

    def _candidates(self, probe: Probe) -> list[int]:
        """List the clients that have the data of a probe."""
        if probe.source != "validation":
            return list(range(self.data.num_clients))
        held_out: Sequence[Tensor] = self.data.held_out_indices
        if self.data.evaluation is not None:
            held_out = self.data.evaluation.train_indices
        return [client for client, samples in enumerate(held_out) if len(samples)]

    # ------------------------------------------------------------------ the two forms

    def at_start(self, plan: RoundPlan, engine: Engine, tally: Tally) -> Probed:
        """Let a rule with the parallel form learn from the model that the round has broadcast.

        Args:
            plan: The plan of the round.
            engine: The engine, which knows the clients' own parameters and the cost of each.
            tally: Counts what happens.
        """
        if not self._is_form("parallel"):
            return Probed()
        return self._run(plan, plan.start, engine, tally, is_new_model=False)

    def at_end(
        self, plan: RoundPlan, engine: Engine, tally: Tally, metrics: Mapping[str, float], probed: Probed
    ) -> Probed:
        """Let a rule with the sequential form learn from the new model.

        Args:
            plan: The plan of the round.
            engine: As in :meth:`at_start`.
            tally: As in :meth:`at_start`.
            metrics: The numbers of the round's aggregation, which say whether there is a new model.
            probed: The outcome of :meth:`at_start`, which stays that of the round for all other rules.
        """
        if not self._is_form("sequential") or "round_skipped" in metrics:
            return probed
        if self._probe.source != "proxy":
            tally.probe_rounds += 1
        return self._run(plan, self.server.parameters(), engine, tally, is_new_model=True)

    @property
    def _probe(self) -> Probe:
        assert self.rule.probe is not None
        return self.rule.probe

    def _is_form(self, form: ProbeForm) -> bool:
        return self.rule.probe is not None and self.rule.probe.form == form

    def _run(self, plan: RoundPlan, model: Tensor, engine: Engine, tally: Tally, *, is_new_model: bool) -> Probed:
        """Ask, receive the answers, and let the rule learn."""
        with tally.phase("local training"):
            if self._probe.source == "proxy":
                result = self._ask_server(plan.round, model)
                cost = Probed()
            else:
                self._settle_batch_size(engine)
                question = self._ask(plan, model, is_new_model=is_new_model)
                answers = self._answers(question, engine)
                result, cost = self._receive(question, *answers)
                tally.probe_answers += len(answers[0])
        with tally.phase("aggregation"):
            metrics = self._learn(plan.round, result, tally)
        return replace(cost, metrics=metrics)

    def _settle_batch_size(self, engine: Engine) -> None:
        """Take larger batches than in training where the rule leaves it open and they give the same gradient."""
        if not self._is_size_open:
            return
        model = self.server.parameters()

        def gradients(client: int, batches: Iterable[ClientBatch]) -> list[Tensor]:
            # The global model's buffers and own parameters: those of a client may be in another process.
            with isolated_randomness(self.host.device), turns(self.host):
                self.host.client = client
                seed_randomness(seed_of(self.seed, "probe", "batch size"), self.host.device)
                prepared = ((self.host.prepare(batch.data), batch.index, batch.size) for batch in batches)
                return [self._loss_and_gradient(model, prepared, buffers=self.server.buffers)[1]]

        is_held_out = self._probe.source == "validation"
        self.data = with_larger_batches(self.data, gradients, held_out=is_held_out, limit=engine.plan.limit)
        self._is_size_open = False

    def _learn(self, round_idx: int, result: ProbeResult | None, tally: Tally) -> dict[str, float]:
        """Give the rule the result; without one it does not learn in this round."""
        if result is None:
            tally.skipped_probes += 1
            rank_zero_warn(
                f"No finite answer of the probe was received in round {round_idx}: what `{type(self.rule).__name__}`"
                " learns stays as it was."
            )
            return {"probe_clients": 0.0, "probe_skipped": 1.0}
        state, learned = self.rule.learn_from(result, self.rule.state, self.server)
        new_state: State = dict(state)
        self.rule.state = new_state
        return {"probe_loss": result.loss, "probe_clients": float(len(result.clients)), **learned}

    # ------------------------------------------------------------------ down

    def _ask(self, plan: RoundPlan, model: Tensor, *, is_new_model: bool) -> _Question:
        """Draw the clients, and send the model to those that do not have it."""
        self.transport.forget()
        drawn = self._draw(plan)
        models: dict[int, Tensor] = {}
        sent_to = []
        for client in drawn:
            if is_new_model or client not in plan.clients:
                sent_to.append(client)
            elif client in plan.models and client not in plan.outdated:
                models[client] = plan.models[client]
        models.update(self.transport.broadcast(plan.round, sent_to, model).models)
        return _Question(plan.round, model, drawn, models, sent_to)

    def _draw(self, plan: RoundPlan) -> list[int]:
        """Draw the clients of a probe, in ascending order."""
        if self._probe.source == "cohort":
            return list(plan.clients)
        candidates = self._candidates(self._probe)
        count = self._probe.num_clients or len(plan.clients)
        if self.cohort_cap is not None:
            count = min(count, self.cohort_cap)
        order = torch.randperm(len(candidates), generator=stream(self.seed, "probe", "round", plan.round))
        return sorted(candidates[position] for position in order[:count].tolist())

    # ------------------------------------------------------------------ up

    def _answers(self, question: _Question, engine: Engine) -> tuple[list[UpdateRecord], list[str], VectorStore]:
        """Let all processes compute their clients' answers.

        Returns:
            The records of all processes in the order of the clients, a sentence for each answer that is left out, and
            the store with this process's gradients.
        """
        lost = self.transport.uplink_outages(question.round, list(question.models))
        asked = [client for client in question.drawn if client in question.models and client not in lost]
        own_clients = self.placement.assign(asked, engine.cost)
        store = make_sum(self.rule, self.options, question.model, len(own_clients), self.ranks)
        shares = self.ranks.exchange(lambda: self._own_answers(question, own_clients, store, engine))
        records = [record for share in shares for record in share.records]
        excluded = [sentence for share in shares for sentence in share.excluded]
        records.sort(key=lambda record: record.update.client)
        return records, excluded, store

    def _own_answers(
        self, question: _Question, own_clients: Sequence[int], store: VectorStore, engine: Engine
    ) -> _Answers:
        """Compute the answers of this process's clients, and send them up."""
        records: list[UpdateRecord] = []
        excluded: list[str] = []
        with turns(self.host):
            for client in own_clients:
                self.host.client = client
                answer = self._answer(question, client, engine)
                if _is_finite(answer):
                    self.transport.transmit(question.round, answer)
                if not _is_finite(answer):
                    excluded.append(self._nonfinite_sentence(question.round, client))
                    continue
                weight = 1.0
                if self._probe.weighting == "examples":
                    weight = float(answer.num_examples)
                store.commit(answer, weight)
                rms = self.transport.rms(answer)
                records.append(
                    UpdateRecord(replace(answer, displacement=_NO_VECTOR), True, weight, self.ranks.rank, rms)
                )
        return _Answers(records, excluded)

    def _nonfinite_sentence(self, round_idx: int, client: int) -> str:
        sentence = f"Client {client} answered the probe of round {round_idx} with a loss or gradient that is not finite"
        if self.options.on_nonfinite == "raise":
            raise FloatingPointError(
                f'{sentence}, and `on_nonfinite="raise"` ends the run. Lower the learning rates, or set'
                ' `on_nonfinite="exclude"`.'
            )
        return sentence

    def _answer(self, question: _Question, client: int, engine: Engine) -> ClientUpdate:
        """Compute the answer of one client: its gradient as the vector of an update, and its loss."""
        held_out = self._probe.source == "validation"
        batches = self.data.full_pass(client, question.round, held_out=held_out, limit=engine.plan.limit)
        own = engine.local_parameters.start(client)
        with isolated_randomness(self.host.device):
            seed_randomness(seed_of(self.seed, "client", client, "round", question.round, "probe"), self.host.device)
            loss, gradient, count = self._loss_and_gradient(
                question.models[client],
                ((self.host.prepare(batch.data), batch.index, batch.size) for batch in batches),
                buffers=self.buffers.start(client),
                local_parameters=own,
            )
        return ClientUpdate(client, count, 0, 0, gradient, initial_loss=loss)

    def _loss_and_gradient(
        self, model: Tensor, batches: Iterable[tuple[Batch, int, int]], **own: Mapping[str, Tensor]
    ) -> tuple[float, Tensor, int]:
        """Compute the mean loss and gradient ``[P]`` over batches, each with its number and size; and count samples."""
        vector = model.detach().clone().requires_grad_()
        gradient = torch.zeros_like(model)
        total = torch.zeros((), dtype=torch.float64, device=self.host.device)
        count = 0
        with torch.enable_grad():
            for data, index, size in batches:
                loss = self.server.loss(vector, data, index, **own)
                (slope,) = torch.autograd.grad(loss, vector)
                gradient.add_(slope, alpha=size)
                # Added on the device, which is then waited for once.
                total += loss.detach().double() * size
                count += size
        return float(total) / count, gradient.div_(count), count

    def _receive(
        self, question: _Question, records: Sequence[UpdateRecord], excluded: Sequence[str], store: VectorStore
    ) -> tuple[ProbeResult | None, Probed]:
        """Average the answers of all processes, and count their bytes."""
        for sentence in excluded:
            rank_zero_warn(f"{sentence}, and was left out.")
        cost = self._cost(question, [record.update.client for record in records])
        if not records:
            return None, cost
        vectors = store.vectors(question.model, records)
        assert isinstance(vectors, AccumulatedVectors)
        if self.transport.is_summed:
            self.transport.superpose(vectors, records, round_idx=question.round, drawn=len(question.drawn))
        weights = torch.tensor([record.unnormalized_weight for record in records], dtype=torch.float64)
        weights = weights / weights.sum()
        losses = torch.tensor([record.update.initial_loss for record in records], dtype=torch.float64)
        clients = torch.tensor([record.update.client for record in records])
        gradient = vectors.displacements.weighted_sum(weights).to(question.model)
        loss = float(weights @ losses)
        if not all_finite(gradient):  # a channel that acts on the sum may have spoiled it
            return None, cost
        return ProbeResult(question.round, question.model, loss, gradient, clients, weights), cost

    def _cost(self, question: _Question, answered: Sequence[int]) -> Probed:
        """Count the bytes of both links: models with their buffers down, gradients and losses up."""
        down = self.transport.sent_bytes("downlink", question.round, question.sent_to)
        down += len(question.sent_to) * self.buffers.message_bytes
        up = self.transport.sent_bytes("uplink", question.round, answered)
        up += len(answered) * self.server.layout.dtype.itemsize
        return Probed(bytes_down=down, bytes_up=up)

    # ------------------------------------------------------------------ the server's own data

    def _ask_server(self, round_idx: int, model: Tensor) -> ProbeResult | None:
        """Compute loss and gradient on the server's own data; ``None`` if they are not finite."""
        with isolated_randomness(self.host.device):
            seed_randomness(seed_of(self.seed, "server", "round", round_idx, "probe"), self.host.device)
            loss, gradient, _ = self._loss_and_gradient(model, self._proxy_batches())
        if not (all_finite(gradient) and all_finite(torch.tensor(loss))):
            return None
        nobody = torch.empty(0, dtype=torch.int64)
        return ProbeResult(round_idx, model, loss, gradient, nobody, nobody.double())

    def _proxy_batches(self) -> Iterator[tuple[Any, int, int]]:
        """Pass once over the server's own data, in its order."""
        order = torch.arange(len(self.server.proxy_dataset))
        size = self._probe.batch_size or self.data.settings.batch_size
        for number, index in enumerate(torch.split(order, size)):
            yield self.server.proxy_batch(index), number, len(index)


def _is_finite(answer: ClientUpdate) -> bool:
    """Return whether gradient and loss of an answer are finite."""
    return all_finite(torch.tensor(answer.initial_loss)) and all_finite(answer.displacement)

"""The vectorized engine: many clients at once, as stacks of parameters in one batched computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_fedhaw.clients.engine import Engine, LocalPlan, Visit, add_note, give_settings, settings_of
from lightning_fedhaw.clients.pace import Paced, begin
from lightning_fedhaw.clients.records import Logged, NotAFunctionError, StackRecorder
from lightning_fedhaw.clients.steps import Host
from lightning_fedhaw.clients.vectorized.batched import BatchedStep, ClientDropout
from lightning_fedhaw.clients.vectorized.compiled import CompiledStep
from lightning_fedhaw.clients.vectorized.optimizers import StackedOptimizer
from lightning_fedhaw.clients.vectorized.trial import Facts, explained
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.data.partitioners.partition import swap_labels
from lightning_fedhaw.isolation import isolated_randomness, seed_randomness
from lightning_fedhaw.objectives.base import ClientObjective
from lightning_fedhaw.streams import seed_of
from lightning_fedhaw.vectors.layout import ParameterLayout
from lightning_fedhaw.vectors.memory import is_out_of_memory


class VectorizedEngine(Engine):
    """Trains many clients at once: for modules whose step is a function, as the probe finds out.

    Clients with more batches go on when others have finished, and a shorter last batch is a call of its own together
    with those of the same length: nothing is padded, and no client moves on after its last step.

    Args:
        host: As in the base class, like the four that follow.
        layout: As there.
        data: As there.
        plan: As there.
        objectives: As there.
        facts: What the probe found.
        chunk_memory: Bytes in use at a time.
        compile_clients: Whether the step is compiled from the second round on.
        fallback: Goes on where a step turns out not to be a function after all; without it, that is an error.
    """

    def __init__(
        self,
        host: Host,
        layout: ParameterLayout,
        data: ClientData,
        plan: LocalPlan,
        objectives: Sequence[ClientObjective] = (),
        *,
        facts: Facts,
        chunk_memory: int,
        compile_clients: bool = False,
        fallback: Engine | None = None,
    ) -> None:
        super().__init__(host, layout, data, plan, objectives)
        self.facts, self.fallback, self.gave_up = facts, fallback, False
        self.chunk = max(1, chunk_memory // facts.bytes_per_client)
        self.compile_clients, self.rounds = compile_clients, 0
        self.compiled: CompiledStep | None = None

    def run(self, visits: Iterable[Visit]) -> Generator[ClientUpdate, None, None]:
        """Train the cohort, chunk by chunk. The module keeps its own tensors throughout.

        Yields:
            Each client's update, in the order of the visits.
        """
        host, pending = self.host, iter(visits)
        left: deque[list[Visit]] = deque()
        with isolated_randomness(host.device), StackRecorder(host.module, host.callbacks) as recorder:
            dropout = ClientDropout() if self.facts.draws_dropout else None
            step = BatchedStep(host, self.layout, self.objectives, recorder, dropout)
            if self.compile_clients and self.rounds and self.compiled is None:
                self.compiled = CompiledStep()
            if self.compiled is not None:
                self.compiled.begin(step)
            self.rounds += 1
            while not self.gave_up and (left or (chunk := list(islice(pending, self.chunk)))):
                part = left.popleft() if left else chunk
                trained = self._try(step, part)
                if trained is not None:
                    yield from trained.updates()
                else:
                    left.extendleft((part[self.chunk :], part[: self.chunk]))
                    left = deque(filter(None, left))
                del trained
            if self.compiled is not None:
                self.compiled.report()
        # What `optimizer.step` would leave behind; a schedule that steps next looks for it.
        host.optimizers[0]._opt_called = True  # type: ignore[attr-defined]
        if self.gave_up and self.fallback is not None:
            self.fallback.kept, self.fallback.pace = self.kept, self.pace
            yield from self.fallback.run(chain(*left, pending))

    def _try(self, step: BatchedStep, visits: Sequence[Visit]) -> _Chunk | None:
        optimizers = self.host.optimizers
        settings = settings_of(optimizers)
        try:
            chunk = _Chunk(self, step, visits)
            chunk.train()
            if repr(settings_of(optimizers)) != repr(settings):
                raise NotAFunctionError("changes settings of the optimiser, which all clients share here")
            return chunk
        except Exception as error:
            give_settings(optimizers, settings)
            # Raised here: an error that its own frames know keeps all that they hold, until a garbage collection.
            if not self._recovers(error, step, visits):
                raise
        step.recorder.forget()
        return None

    def _recovers(self, error: Exception, step: BatchedStep, visits: Sequence[Visit]) -> bool:
        """After a failure: less at a time, or one after another; false if neither helps."""
        if is_out_of_memory(error) and len(visits) > 1:
            self.chunk = (len(visits) + 1) // 2
            rank_zero_warn(
                f"{len(visits)} clients at once do not fit into memory; they are trained again, {self.chunk} at a time."
                " `chunk_memory=` bounds what is tried."
            )
        elif self.fallback is not None:
            self.gave_up = True
            rank_zero_warn(
                "Going on with the sequential engine for the rest of the run: in round"
                f" {self.host.round} `training_step` {explained(error)}."
            )
        else:
            clients = ", ".join(str(visit.client) for visit in visits[:10]) + " ..." * (len(visits) > 10)
            add_note(
                error,
                f"{len(visits)} clients at once ({clients}), round {self.host.round}",
                step.recorder.batch_size,
                ' `engine="sequential"` trains one after another, and takes any step.',
            )
            return False
        return True


@dataclass(frozen=True)
class _Call:
    """One batched call.

    Attributes:
        rows: The rows that take part, in ascending order.
        samples: ``[rows, batch]``, their samples.
        index: The batch's number, as ``training_step`` is told.
    """

    rows: list[int]
    samples: Tensor
    index: int


class _Chunk:
    """The clients that train at once, one row each: those with more batches first."""

    def __init__(self, engine: VectorizedEngine, step: BatchedStep, visits: Sequence[Visit]) -> None:
        self.engine, self.step = engine, step
        self._sort(visits)
        self.made, self.skipped = [0] * len(visits), [0] * len(visits)
        self._load_model()
        self._load_objectives()
        self._load_pace()
        self._load_streams(visits[0].client)

    def _sort(self, visits: Sequence[Visit]) -> None:
        """Deal out the rows: those with equal lengths are neighbours, so that most groups of rows are slices."""
        host, plan, data = self.engine.host, self.engine.plan, self.engine.data
        self.size = data.settings.batch_size
        orders = [
            list(data.orders(v.client, host.round, epochs=plan.epochs, num_batches=plan.steps, limit=plan.limit))
            for v in visits
        ]
        lengths = [[order.numel() for order in own] for own in orders]
        by_length = sorted(range(len(visits)), key=lambda i: -sum(lengths[i]))
        self.row_of = sorted(range(len(visits)), key=by_length.__getitem__)
        self.visits = [visits[i] for i in by_length]
        self.orders = [orders[i] for i in by_length]
        self.lengths = [lengths[i] for i in by_length]
        self.clients = [visit.client for visit in self.visits]
        self.swaps = {
            row: data.partition.label_swaps[client]
            for row, client in enumerate(self.clients)
            if client in data.partition.label_swaps
        }

    def _load_model(self) -> None:
        """Stack what the clients start from: parameters, buffers, states of the optimiser."""
        engine, host, layout = self.engine, self.engine.host, self.engine.layout
        first = self.visits[0]
        shared = all(visit.start is first.start for visit in self.visits)
        self.start = first.start.expand(len(self.visits), -1) if shared else torch.stack([v.start for v in self.visits])
        self.stacks = [
            view.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True)
            for view, dtype in zip(layout.views(self.start).values(), layout.dtypes, strict=True)
        ]
        self.buffers = [
            torch.stack([visit.buffers[name].to(host.device) for visit in self.visits])
            for name in self.step.buffer_names
        ]
        place = {id(p): i for i, p in enumerate(layout.tensors(host.module))}
        groups = host.optimizers[0].param_groups
        self.trained = [place.get(id(p)) for group in groups for p in group["params"]]
        fresh = engine.initial
        self.optimizer = StackedOptimizer(
            host.optimizers[0],
            [None if i is None else self.stacks[i] for i in self.trained],
            engine.facts.row_states,
            [engine.kept.get(client, fresh)[0] for client in self.clients],
        )

    def _load_objectives(self) -> None:
        layout = self.engine.layout
        self.starts = layout.views(self.start) if self.engine.objectives else None
        by_objective = zip(*(self.engine.begin_objectives(visit) for visit in self.visits), strict=True)
        self.states = [{name: torch.stack([s[name] for s in own]) for name in own[0]} for own in by_objective]

    def _load_pace(self) -> None:
        engine, layout = self.engine, self.engine.layout
        self.paced: Paced | None = None
        if engine.pace is not None:
            steps = [(layout.views(visit.start), engine.num_steps(visit.client)) for visit in self.visits]
            state = begin(engine.pace, steps, engine.host.learning_rates(layout))
            self.paced = Paced(engine.pace, layout.names, state)

    def _load_streams(self, first: int) -> None:
        """A generator for each client's dropout; other draws follow the client that the chunk begins with."""
        host, seed = self.engine.host, self.engine.plan.seed
        if self.step.dropout is not None:
            self.generators = [
                torch.Generator(host.device).manual_seed(seed_of(seed, "client", client, "round", host.round, "model"))
                for client in self.clients
            ]
        seed_randomness(seed_of(seed, "round", host.round, "clients from", first), host.device)

    def train(self) -> None:
        """Train to the end."""
        for call in self._calls():
            self._make(call)
        layout = self.engine.layout
        self.displacements = torch.empty_like(self.start, memory_format=torch.contiguous_format)
        torch._foreach_copy_(list(layout.views(self.displacements).values()), self.stacks)
        self.displacements.sub_(self.start)

    def _calls(self) -> Iterator[_Call]:
        """Pass by pass: the full batches, of ever fewer rows, then the shorter last ones by their length."""
        size, in_steps = self.size, self.engine.plan.steps is not None
        done = [0] * len(self.orders)
        for each in range(max(map(len, self.orders))):
            orders = [own[each] if each < len(own) else own[0][:0] for own in self.orders]
            full, rest = zip(*(divmod(own[each] if each < len(own) else 0, size) for own in self.lengths), strict=True)
            samples = pad_sequence(orders, batch_first=True)
            for j in range(max(full)):
                rows = [row for row, count in enumerate(full) if count > j]
                for index, group in self._by_index(rows, [done[row] + j for row in rows]):
                    yield _Call(group, samples[_at(group), j * size : (j + 1) * size], index)
            for length in sorted(set(rest) - {0}):
                rows = [row for row, count in enumerate(rest) if count == length]
                for index, group in self._by_index(rows, [done[row] + full[row] for row in rows]):
                    begins = torch.tensor([full[row] * size for row in group])
                    columns = begins[:, None] + torch.arange(length)
                    yield _Call(group, samples[_at(group)].gather(1, columns), index)
            if in_steps:
                done = [d + f + bool(r) for d, f, r in zip(done, full, rest, strict=True)]

    def _by_index(self, rows: list[int], indices: list[int]) -> Iterable[tuple[int, list[int]]]:
        """Rows whose step is told the same number; all of them, where the step does not look."""
        if not self.engine.facts.uses_index:
            return [(indices[0], rows)]
        groups: dict[int, list[int]] = {}
        for row, index in zip(rows, indices, strict=True):
            groups.setdefault(index, []).append(row)
        return groups.items()

    def _make(self, call: _Call) -> None:
        host, rows, step = self.engine.host, call.rows, self.step
        samples, at = call.samples, _at(rows)
        compiled = self.engine.compiled
        extra = 0 if compiled is None else compiled.padding(len(rows), len(self.visits))
        if extra:  # rows that are computed and not looked at
            samples = torch.cat([samples, samples[-1:].expand(extra, -1)])
        taken = _at(rows + rows[-1:] * extra) if extra else at
        data = self.engine.data.gather(samples)
        for i, row in enumerate(rows) if self.swaps else ():
            if row in self.swaps:
                data[1][i] = swap_labels(data[1][i], self.swaps[row])
        if step.dropout is not None:
            step.dropout.generators = [self.generators[row] for row in rows]
        step.recorder.batch_size = samples.shape[1]
        arguments = (
            [stack[taken].requires_grad_() for stack in self.stacks],
            [buffer[taken] for buffer in self.buffers],
            host.prepare(data),
            call.index,
            None if self.starts is None else {n: s[taken] for n, s in self.starts.items()},
            [{n: s[taken] for n, s in state.items()} for state in self.states],
        )
        found = (step if compiled is None else compiled).gradients(
            [i for i in self.trained if i is not None], arguments
        )
        count = len(rows)
        with torch.no_grad():
            if found.logged:
                step.recorder.put(torch.tensor(rows), [value[:count] for value in found.logged])
            for i, value in enumerate(found.buffers(arguments[1])):
                if extra or not isinstance(at, slice) or value.data_ptr() != self.buffers[i][at].data_ptr():
                    self.buffers[i][at] = value[:count]
            if found.losses is not None:
                each = iter(found.gradients)
                gradients = [None if i is None else next(each) for i in self.trained]
                cut = [None if g is None else g[:count] for g in gradients] if extra else gradients
                self._step(rows, at, clipped(cut, host.clipping))
        steps = self.skipped if found.losses is None else self.made
        for row in rows:
            steps[row] += 1

    def _step(self, rows: list[int], at: Any, gradients: Sequence[Tensor | None]) -> None:
        if self.paced is None:
            return self.optimizer.step(rows, at, gradients)
        before = [stack[at].clone() for stack in self.stacks]
        self.optimizer.step(rows, at, gradients)
        own = {i: gradient for i, gradient in zip(self.trained, gradients, strict=True) if i is not None}
        after = [stack[at] for stack in self.stacks]
        self.paced.scale(after, before, [own.get(i) for i in range(len(self.stacks))], at)
        for stack, value in zip(self.stacks, after, strict=True):
            stack[at] = value
        return None

    def updates(self) -> Iterator[ClientUpdate]:
        """The updates, in the order of the visits; each with the client's model in the module, for those who watch."""
        module = self.engine.host.module
        layout = self.engine.layout
        parameters, buffers = layout.tensors(module), layout.moving_buffers(module).values()
        logged = self.step.recorder.collect_rows(len(self.visits))
        for row in self.row_of:
            with torch.no_grad():
                torch._foreach_copy_([*parameters, *buffers], [s[row] for s in (*self.stacks, *self.buffers)])
            yield self._update(row, self.displacements[row], logged[row])

    def _update(self, row: int, displacement: Tensor, logged: dict[str, Logged]) -> ClientUpdate:
        engine, visit = self.engine, self.visits[row]
        memory: dict[str, Any] = {"optimizers": [], "objectives": []}
        if engine.plan.optimizer_state == "kept":
            memory["optimizers"] = [self.optimizer.states(row)]
        if engine.objectives:
            end = {name: stack[row] for name, stack in zip(engine.layout.names, self.stacks, strict=True)}
            states = [{name: stack[row] for name, stack in own.items()} for own in self.states]
            memory["objectives"] = engine.end_objectives(visit, states, end, self.made[row])
        return ClientUpdate(
            client=visit.client,
            num_examples=len(engine.data.train_indices[visit.client]),
            num_steps=self.made[row],
            num_skipped=self.skipped[row],
            displacement=displacement,
            buffers={n: b[row].clone() for n, b in zip(self.step.buffer_names, self.buffers, strict=True)},
            logged=logged,
            memory=memory,
            num_batches=engine.num_batches(visit.client),
        )


def _at(rows: list[int]) -> Any:
    """Rows as a slice where they are neighbours, else as an index."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)


def clipped(gradients: Sequence[Tensor | None], clipping: tuple[float, str] | None) -> Sequence[Tensor | None]:
    """Each client's gradient, clipped as ``torch.nn.utils.clip_grad_norm_`` or ``clip_grad_value_`` clips one.

    Args:
        gradients: ``[rows, *shape]`` each.
        clipping: The bound, and ``"norm"`` or ``"value"``.
    """
    given = [gradient for gradient in gradients if gradient is not None]
    if clipping is None or not given:
        return gradients
    bound, algorithm = clipping
    if algorithm == "value":
        return [None if gradient is None else gradient.clamp(-bound, bound) for gradient in gradients]
    norms = torch.stack([torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in given])
    scale = (bound / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    # Not in place: an expanded gradient shares its elements.
    return [
        None if gradient is None else gradient * scale.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1))
        for gradient in gradients
    ]

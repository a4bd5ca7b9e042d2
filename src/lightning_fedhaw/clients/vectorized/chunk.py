"""The clients that train at once: one row each in stacks of parameters, buffers and optimizer states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_fedhaw.clients.engine import ClientTask, Engine
from lightning_fedhaw.clients.lr_scale import ScaledSteps, initial_scale_states
from lightning_fedhaw.clients.records import Logged
from lightning_fedhaw.clients.vectorized.batched import BatchedStep, StepInputs
from lightning_fedhaw.clients.vectorized.compiled import CompiledStep
from lightning_fedhaw.clients.vectorized.optimizers import StackedOptimizer
from lightning_fedhaw.clients.vectorized.trial import Facts
from lightning_fedhaw.cohort import ClientUpdate
from lightning_fedhaw.data.partitioners.partition import swap_labels
from lightning_fedhaw.isolation import seed_randomness
from lightning_fedhaw.objectives.base import ClientState
from lightning_fedhaw.streams import seed_of


class _Call(NamedTuple):
    """One batched call.

    Attributes:
        rows: The rows that take part, in ascending order.
        samples: ``[rows, batch]``, their samples.
        batch_index: The batch's number, which ``training_step`` is given.
    """

    rows: list[int]
    samples: Tensor
    batch_index: int


class Chunk:
    """Train some clients at once, one row each: those with more batches first.

    Args:
        engine: The engine, with the plan, the data, and what its clients keep from round to round.
        tasks: What each client starts from.
        step: The batched step.
        facts: What the probe found out about the step.
        compiled: The compiled step, to be called instead.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Sequence[ClientTask],
        step: BatchedStep,
        facts: Facts,
        compiled: CompiledStep | None = None,
    ) -> None:
        self.engine = engine
        self.step = step
        self.facts = facts
        self.compiled = compiled
        self._sort(tasks)
        self.made = [0] * len(tasks)
        self.skipped = [0] * len(tasks)
        self._load_model()
        self._load_objectives()
        self._load_lr_scale()
        self._load_streams(tasks[0].client)

    # ------------------------------------------------------------------ what the clients start from

    def _sort(self, tasks: Sequence[ClientTask]) -> None:
        """Assign the rows: clients with equally many samples are neighbors, so that most groups of rows are slices."""
        plan = self.engine.plan
        data = self.engine.data
        round_idx = self.engine.host.round
        orders = []
        for task in tasks:
            passes = data.orders(task.client, round_idx, epochs=plan.epochs, num_batches=plan.steps, limit=plan.limit)
            orders.append(list(passes))
        totals = [sum(order.numel() for order in passes) for passes in orders]
        by_length = sorted(range(len(tasks)), key=lambda i: -totals[i])
        self.row_of = sorted(range(len(tasks)), key=by_length.__getitem__)
        self.tasks = [tasks[i] for i in by_length]
        # By row and pass: the samples in the order in which the client sees them.
        self.orders = [orders[i] for i in by_length]
        self.clients = [task.client for task in self.tasks]
        self.swaps = {}
        for row, client in enumerate(self.clients):
            if client in data.partition.label_swaps:
                self.swaps[row] = data.partition.label_swaps[client]

    def _load_model(self) -> None:
        """Stack what the clients start from: parameters, buffers, states of the optimizer."""
        engine = self.engine
        host = engine.host
        layout = engine.layout
        first = self.tasks[0].start
        if all(task.start is first for task in self.tasks):
            self.start = first.expand(len(self.tasks), -1)
        else:
            self.start = torch.stack([task.start for task in self.tasks])
        self.stacks = [
            view.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True)
            for view, dtype in zip(layout.views(self.start).values(), layout.dtypes, strict=True)
        ]
        self.buffers = []
        for name in self.step.buffer_names:
            self.buffers.append(torch.stack([task.buffers[name].to(host.device) for task in self.tasks]))
        optimizer = host.optimizers[0]
        number_of = {id(parameter): i for i, parameter in enumerate(layout.tensors(host.module))}
        # Where each of the optimizer's parameters is among the stacks; `None` for one that is frozen.
        self.trained = [number_of.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
        self.optimizer = StackedOptimizer(
            optimizer,
            [None if i is None else self.stacks[i] for i in self.trained],
            self.facts.row_states,
            [engine.optimizer_states.get(client, engine.initial_states)[0] for client in self.clients],
        )

    def _load_objectives(self) -> None:
        """Stack what the clients' objectives work with."""
        self.starts = self.engine.layout.views(self.start) if self.engine.objectives else None
        states_of_clients = [self.engine.begin_objectives(task) for task in self.tasks]
        self.states: list[ClientState] = []
        for states in zip(*states_of_clients, strict=True):
            self.states.append({name: torch.stack([state[name] for state in states]) for name in states[0]})

    def _load_lr_scale(self) -> None:
        """Take the clients' states of the learning-rate scale, where the rule has one."""
        engine = self.engine
        layout = engine.layout
        self.scaled_steps: ScaledSteps | None = None
        if engine.lr_scale is not None:
            steps = [(layout.views(task.start), engine.num_steps(task.client)) for task in self.tasks]
            state = initial_scale_states(engine.lr_scale, steps, engine.host.learning_rates(layout))
            self.scaled_steps = ScaledSteps(engine.lr_scale, layout.names, state)

    def _load_streams(self, first: int) -> None:
        """Let random numbers other than dropout's follow the client that the chunk begins with."""
        host = self.engine.host
        seed = self.engine.plan.seed
        self._generators: dict[int, torch.Generator] = {}
        seed_randomness(seed_of(seed, "round", host.round, "clients from", first), host.device)

    def _generator(self, row: int) -> torch.Generator:
        """Return the generator of a client's dropout masks, which is made when it is first asked for."""
        if row not in self._generators:
            host = self.engine.host
            seed = seed_of(self.engine.plan.seed, "client", self.clients[row], "round", host.round, "model")
            self._generators[row] = torch.Generator(host.device).manual_seed(seed)
        return self._generators[row]

    # ------------------------------------------------------------------ the work

    def train(self) -> None:
        """Train to the end."""
        try:
            for call in self._calls():
                self._make(call)
        finally:
            # Otherwise chunk and step know each other, and what they hold waits for a garbage collection.
            self.step.guard.generators = tuple
        layout = self.engine.layout
        self.displacements = torch.empty_like(self.start, memory_format=torch.contiguous_format)
        torch._foreach_copy_(list(layout.views(self.displacements).values()), self.stacks)
        self.displacements.sub_(self.start)

    def _calls(self) -> Iterator[_Call]:
        """Plan the calls, pass by pass.

        In each pass the full batches come first, of ever fewer rows, then the shorter last ones by their length.
        """
        size = self.engine.data.settings.batch_size
        counts_steps = self.engine.plan.steps is not None
        # With `local_steps` the batches are numbered through all passes; otherwise each pass begins with 0.
        batches_before = [0] * len(self.orders)
        for pass_ in range(max(map(len, self.orders))):
            orders = [passes[pass_] if pass_ < len(passes) else passes[0][:0] for passes in self.orders]
            full = [order.numel() // size for order in orders]
            rest = [order.numel() % size for order in orders]
            samples = pad_sequence(orders, batch_first=True)
            for j in range(max(full)):
                rows = [row for row, count in enumerate(full) if count > j]
                for index, group in self._by_index(rows, [batches_before[row] + j for row in rows]):
                    yield _Call(group, samples[_at(group), j * size : (j + 1) * size], index)
            for length in sorted(set(rest) - {0}):
                rows = [row for row, count in enumerate(rest) if count == length]
                for index, group in self._by_index(rows, [batches_before[row] + full[row] for row in rows]):
                    begins = torch.tensor([full[row] * size for row in group])
                    columns = begins[:, None] + torch.arange(length)
                    yield _Call(group, samples[_at(group)].gather(1, columns), index)
            if counts_steps:
                for row in range(len(orders)):
                    batches_before[row] += full[row] + bool(rest[row])

    def _by_index(self, rows: list[int], indices: list[int]) -> Iterable[tuple[int, list[int]]]:
        """Group rows by the number that their step is given; all of them in one group, where the step ignores it."""
        if not self.facts.uses_index:
            return [(indices[0], rows)]
        groups: dict[int, list[int]] = {}
        for row, index in zip(rows, indices, strict=True):
            groups.setdefault(index, []).append(row)
        return groups.items()

    def _make(self, call: _Call) -> None:
        """Make a call, and one step of each of its clients."""
        rows, samples, batch_index = call
        count = len(rows)
        at = _at(rows)
        # A compiled step has graphs for few numbers of rows: the last row is repeated, and the copies are dropped.
        extra = 0 if self.compiled is None else self.compiled.padding(count, len(self.tasks))
        taken = at
        if extra:
            taken = _at(rows + rows[-1:] * extra)
            samples = torch.cat([samples, samples[-1:].expand(extra, -1)])
        inputs = self._inputs(rows, taken, samples, batch_index)
        self.step.recorder.batch_size = samples.shape[1]
        trained = [i for i in self.trained if i is not None]
        outputs = (self.compiled or self.step).gradients(trained, inputs)
        with torch.no_grad():
            if outputs.logged:
                self.step.recorder.put(torch.tensor(rows), [value[:count] for value in outputs.logged])
            for i, value in enumerate(outputs.buffers(inputs.buffers)):
                # One that was changed in place is a part of the stack.
                if extra or not isinstance(at, slice) or value.data_ptr() != self.buffers[i][at].data_ptr():
                    self.buffers[i][at] = value[:count]
            if outputs.losses is not None:
                remaining = iter(outputs.gradients)
                gradients = [None if i is None else next(remaining) for i in self.trained]
                if extra:
                    gradients = [None if gradient is None else gradient[:count] for gradient in gradients]
                self._step(rows, at, clipped(gradients, self.engine.host.clipping))
        steps = self.skipped if outputs.losses is None else self.made
        for row in rows:
            steps[row] += 1

    def _inputs(self, rows: list[int], taken: Any, samples: Tensor, batch_index: int) -> StepInputs:
        """Collect what a call is given.

        Args:
            rows: Its rows.
            taken: The same, with the copies of the last row that a compiled step needs, as a slice or index.
            samples: ``[rows and copies, batch]``, the samples.
            batch_index: The batch's number.
        """
        data = self.engine.data.gather(samples)
        if self.swaps:
            for i, row in enumerate(rows):
                if row in self.swaps:
                    data[1][i] = swap_labels(data[1][i], self.swaps[row])
        self.step.guard.generators = lambda: [self._generator(row) for row in rows]
        starts = None
        if self.starts is not None:
            starts = {name: stack[taken] for name, stack in self.starts.items()}
        return StepInputs(
            parameters=[stack[taken].requires_grad_() for stack in self.stacks],
            buffers=[buffer[taken] for buffer in self.buffers],
            batch=self.engine.host.prepare(data),
            batch_index=batch_index,
            starts=starts,
            states=[{name: stack[taken] for name, stack in state.items()} for state in self.states],
        )

    def _step(self, rows: list[int], at: Any, gradients: Sequence[Tensor | None]) -> None:
        """Step the optimizer of each client of a call, and scale the step where the rule scales learning rates."""
        if self.scaled_steps is None:
            self.optimizer.step(rows, at, gradients)
            return
        before = [stack[at].clone() for stack in self.stacks]
        self.optimizer.step(rows, at, gradients)
        after = [stack[at] for stack in self.stacks]
        gradient_of = dict(zip(self.trained, gradients, strict=True))
        self.scaled_steps.scale(after, before, [gradient_of.get(i) for i in range(len(self.stacks))], at)
        for stack, value in zip(self.stacks, after, strict=True):
            stack[at] = value

    # ------------------------------------------------------------------ what comes out

    def updates(self) -> Iterator[ClientUpdate]:
        """Return the updates, in the order of the tasks.

        Yields:
            Each update, while the client's model is in the module, for callbacks that look at it.
        """
        module = self.engine.host.module
        layout = self.engine.layout
        tensors = [*layout.tensors(module), *layout.tracked_buffers(module).values()]
        stacks = [*self.stacks, *self.buffers]
        logged = self.step.recorder.collect_rows(len(self.tasks))
        for row in self.row_of:
            with torch.no_grad():
                torch._foreach_copy_(tensors, [stack[row] for stack in stacks])
            yield self._update(row, self.displacements[row], logged[row])

    def _update(self, row: int, displacement: Tensor, logged: dict[str, Logged]) -> ClientUpdate:
        engine = self.engine
        task = self.tasks[row]
        memory: dict[str, Any] = {"optimizers": [], "objectives": []}
        if engine.plan.optimizer_state == "kept":
            memory["optimizers"] = [self.optimizer.states(row)]
        if engine.objectives:
            end = {name: stack[row] for name, stack in zip(engine.layout.names, self.stacks, strict=True)}
            states = [{name: stack[row] for name, stack in state.items()} for state in self.states]
            memory["objectives"] = engine.end_objectives(task, states, end, self.made[row])
        buffers = {}
        for name, buffer in zip(self.step.buffer_names, self.buffers, strict=True):
            buffers[name] = buffer[row].clone()
        return ClientUpdate(
            client=task.client,
            num_examples=len(engine.data.train_indices[task.client]),
            num_steps=self.made[row],
            num_skipped=self.skipped[row],
            displacement=displacement,
            buffers=buffers,
            logged=logged,
            memory=memory,
            num_batches=engine.num_batches(task.client),
        )


def _at(rows: list[int]) -> Any:
    """Rows as a slice where they are neighbors, else as an index."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)


def clipped(gradients: Sequence[Tensor | None], clipping: tuple[float, str] | None) -> Sequence[Tensor | None]:
    """Clip each client's gradient as ``torch.nn.utils.clip_grad_norm_`` or ``clip_grad_value_`` clips one.

    Args:
        gradients: ``[rows, *shape]`` each.
        clipping: The bound, and ``"norm"`` or ``"value"``.
    """
    used = [gradient for gradient in gradients if gradient is not None]
    if clipping is None or not used:
        return gradients
    bound, algorithm = clipping
    if algorithm == "value":
        return [None if gradient is None else gradient.clamp(-bound, bound) for gradient in gradients]
    norms = torch.stack([torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1) for gradient in used])
    scale = (bound / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    # Not in place: an expanded gradient shares its elements.
    return [
        None if gradient is None else gradient * scale.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1))
        for gradient in gradients
    ]
